//! A Hugging Face chat template, rendered as transformers renders it and bounded against hostile ones.

use std::borrow::Cow;
use std::io::{self, Write};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind};
use time::OffsetDateTime;

use super::python;

/// Work one render may do, in engine steps. Also bounds what it can allocate, at 64 bytes a step.
/// A conversation of 1000 turns takes some 100 000 steps.
const RENDER_FUEL: u64 = 1_000_000;
/// Stack to render hostile templates on, in bytes: with [`RENDER_FUEL`] a template can nest lists some
/// 100 000 deep, and the engine drops them recursively.
pub(super) const RENDER_STACK_BYTES: usize = 256 << 20;
/// Deepest nesting of macros and loops; real templates stay under 20.
const RECURSION_MAX: usize = 120;
/// Longest rendering, in bytes; more than any sequence length can hold.
const RENDERED_BYTES_MAX: usize = 16 << 20;
/// Longest template source, in bytes; the longest known ones have 20 KiB.
pub(crate) const TEMPLATE_BYTES_MAX: u64 = 1 << 20;

const NAME: &str = "chat_template";

/// Why a template did not compile or did not render.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The source is not a template.
    #[error("the chat template does not compile: {0}")]
    Compile(String),
    /// The template called `raise_exception`, failed, or went over a limit.
    #[error("the chat template refused the conversation: {0}")]
    Render(String),
    /// The rendering is too long.
    #[error("the chat template renders more than {RENDERED_BYTES_MAX} bytes")]
    TooLong,
}

/// A compiled chat template with the named tokens it may print.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    named_tokens: Vec<(String, String)>,
}

impl ChatTemplate {
    /// Compiles `source` in an environment like that of transformers: `trim_blocks`, `lstrip_blocks`, loop
    /// controls, `raise_exception`, `strftime_now` (which answers `now`), its own `tojson`, Python's string
    /// and dictionary methods. `{% generation %}` only marks text, so it is compiled as a plain scope.
    ///
    /// `named_tokens` are variables such as `bos_token`.
    ///
    /// # Errors
    /// [`TemplateError::Compile`] with the engine's reason and line.
    pub fn new(
        source: &str,
        named_tokens: Vec<(String, String)>,
        now: OffsetDateTime,
    ) -> Result<Self, TemplateError> {
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|error| TemplateError::Compile(describe(&error)))?;
        let mut environment = Environment::new();
        environment.set_syntax(syntax);
        environment.set_fuel(Some(RENDER_FUEL));
        environment.set_recursion_limit(RECURSION_MAX);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", python::tojson);
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<Value, Error> {
                Err(Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        environment.add_function("strftime_now", move |format: &str| {
            python::strftime(now, format)
        });
        environment
            .add_template_owned(NAME, without_generation_tags(source).into_owned())
            .map_err(|error| TemplateError::Compile(describe(&error)))?;
        Ok(Self {
            environment,
            named_tokens,
        })
    }

    /// Renders `messages` (maps with `role` and `content`).
    ///
    /// # Errors
    /// [`TemplateError::Render`] and [`TemplateError::TooLong`].
    pub fn render(
        &self,
        messages: &[Value],
        add_generation_prompt: bool,
    ) -> Result<String, TemplateError> {
        let named = self
            .named_tokens
            .iter()
            .map(|(name, token)| (name.as_str(), Value::from(token.as_str())));
        let context = Value::from_pairs(named.chain([
            ("messages", Value::from(messages.to_vec())),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
        ]));
        let refused = |error: Error| TemplateError::Render(describe(&error));
        let template = self.environment.get_template(NAME).map_err(refused)?;
        let mut out = Bounded {
            bytes: Vec::new(),
            full: false,
        };
        let rendered = template.render_captured_to(context, &mut out).map(drop);
        if out.full {
            return Err(TemplateError::TooLong);
        }
        rendered.map_err(refused)?;
        String::from_utf8(out.bytes).map_err(|error| TemplateError::Render(error.to_string()))
    }
}

/// The engine's message, with the line it points at and without the source listing.
fn describe(error: &Error) -> String {
    let text = error
        .detail()
        .map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("{text} (line {line})"),
        None => text,
    }
}

/// Turns `{% generation %}` and `{% endgeneration %}` into `{% with %}` and `{% endwith %}`: what they
/// enclose is rendered as it stands, in a scope of its own, with the tags' white space control kept.
fn without_generation_tags(source: &str) -> Cow<'_, str> {
    let mut out = String::new();
    let mut copied = 0;
    for (open, _) in source.match_indices("{%") {
        let inside = source[open + 2..]
            .trim_start_matches(['-', '+'])
            .trim_start();
        let (word, plain) = if inside.starts_with("generation") {
            ("generation", "with")
        } else if inside.starts_with("endgeneration") {
            ("endgeneration", "endwith")
        } else {
            continue;
        };
        let start = source.len() - inside.len();
        let after = source[start + word.len()..].trim_start();
        if after
            .strip_prefix(['-', '+'])
            .unwrap_or(after)
            .starts_with("%}")
        {
            out.push_str(&source[copied..start]);
            out.push_str(plain);
            copied = start + word.len();
        }
    }
    if copied == 0 {
        return Cow::Borrowed(source);
    }
    out.push_str(&source[copied..]);
    Cow::Owned(out)
}

/// Collects a rendering up to [`RENDERED_BYTES_MAX`].
struct Bounded {
    bytes: Vec<u8>,
    full: bool,
}

impl Write for Bounded {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + buffer.len() > RENDERED_BYTES_MAX {
            self.full = true;
            return Err(io::Error::other("rendering too long"));
        }
        self.bytes.extend_from_slice(buffer);
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str) -> Result<String, TemplateError> {
        let user = Value::from_pairs([("role", "user"), ("content", "hi")]);
        ChatTemplate::new(
            source,
            vec![("bos_token".into(), "<s>".into())],
            OffsetDateTime::UNIX_EPOCH,
        )?
        .render(&[user], true)
    }

    #[test]
    fn generation_tags_leave_only_what_they_enclose() {
        let source = "a\n{%- generation -%}\n b {% endgeneration %} c{% generationx %}";
        assert_eq!(
            without_generation_tags(source),
            "a\n{%- with -%}\n b {% endwith %} c{% generationx %}"
        );
        assert_eq!(
            render("{% generation %}{{ bos_token }}{% endgeneration %}!").unwrap(),
            "<s>!"
        );
    }

    #[test]
    fn a_raised_exception_is_the_reason() {
        let error = render("{{ raise_exception('no system turn here') }}").unwrap_err();
        assert!(error.to_string().contains("no system turn here"), "{error}");
    }

    #[test]
    fn hostile_templates_end() {
        let hostile = [
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "{% set ns = namespace(x='0123456789') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
            "{% for a in range(90000) %}{{ 'x' * 90000 }}{% endfor %}",
            "{{ [0] * 99999999999 }}",
            "{% set ns = namespace(x=[]) %}{% for a in range(99999) %}{% for b in range(99) %}{% set ns.x = [ns.x] %}{% endfor %}{% endfor %}",
            "{% set ns = namespace(x=[]) %}{% for a in range(999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson }}",
            "{{ [1] | tojson(indent=99999999999) }}",
            "{{ strftime_now('%A' * 99999999) }}",
            "{{ messages[9].role }}",
        ];
        let all_end = move || {
            for source in hostile {
                assert!(render(source).is_err(), "{source}");
            }
        };
        let thread = std::thread::Builder::new()
            .stack_size(RENDER_STACK_BYTES)
            .spawn(all_end);
        thread.unwrap().join().unwrap();
    }
}
