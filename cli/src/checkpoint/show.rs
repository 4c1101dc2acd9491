//! Listing checkpoints and showing one.

use anyhow::{Context, Result};
use cairn_proto::client::Client;
use cairn_proto::limits::PAGE_SIZE_MAX;
use cairn_proto::v1::{Checkpoint, GetCheckpointResponse, ListCheckpointsRequest};
use serde_json::{Value, json};

use super::spectrum::{self, number};
use crate::output::{Output, table};
use crate::round::events::{loss, short};
use crate::{clock, pages};

/// Lists a model's checkpoints, newest first.
pub async fn list(client: &Client, model: &str, output: Output) -> Result<()> {
    let checkpoints = pages::all(|page_token| async {
        let request = ListCheckpointsRequest {
            model: model.to_owned(),
            page_size: PAGE_SIZE_MAX as i32,
            page_token,
        };
        let page = client
            .call(|mut to| {
                let request = request.clone();
                async move { to.models.list_checkpoints(request).await }
            })
            .await
            .context("list the checkpoints")?;
        Ok((page.checkpoints, page.next_page_token))
    })
    .await?;
    let header = [
        "revision",
        "commit",
        "contributions",
        "gate loss",
        "audit loss",
        "norm",
        "effective rank",
        "made",
        "",
    ];
    output.list(&checkpoints, &header, to_json, |one| {
        let spectrum = spectrum::of(one);
        vec![
            one.revision.to_string(),
            short(&one.commit).to_owned(),
            one.contributions.to_string(),
            loss(one.gate_loss),
            loss(one.audit_loss),
            number(spectrum.norm, 4),
            number(spectrum.effective_rank, 1),
            clock::date(one.created_ms),
            remark(one),
        ]
    })
}

/// Shows one with its stack's norm and effective rank, module by module.
pub fn show(found: &GetCheckpointResponse, output: Output) -> Result<()> {
    let one = found.checkpoint.clone().unwrap_or_default();
    let bytes = |files: &[cairn_proto::v1::File]| -> u64 {
        let sizes = files.iter().filter_map(|file| file.blob.as_ref());
        sizes.map(|blob| blob.size_bytes).sum()
    };
    let mut json = to_json(&one);
    json["files"] = found.files.len().into();
    json["bytes"] = bytes(&found.files).into();
    output.result(&json, || to_text(&one, bytes(&found.files)))
}

/// What a reader must know besides the numbers; empty when there is nothing.
fn remark(one: &Checkpoint) -> String {
    let mut words = Vec::new();
    if one.refold_of > 0 {
        words.push(format!(
            "revision {} without what was revoked",
            one.refold_of
        ));
    }
    if one.revoked > 0 {
        let count = one.revoked;
        words.push(format!("{count} of its contributions revoked"));
    }
    if one.replaced_by > 0 {
        words.push(format!("use {}", one.replaced_by));
    }
    words.join("; ")
}

fn to_json(one: &Checkpoint) -> Value {
    let spectrum = spectrum::of(one);
    let revision = |number: u32| (number > 0).then_some(number);
    json!({
        "model": one.model,
        "revision": one.revision,
        "commit": one.commit,
        "parent": one.parent_commit,
        "round": one.round_id,
        "contributions": one.contributions,
        "gate_loss": one.gate_loss,
        "audit_loss": one.audit_loss,
        "norm": spectrum.norm,
        "effective_rank": spectrum.effective_rank,
        "modules": spectrum.modules,
        "compressed": spectrum.compressed,
        "unmeasured": spectrum.unmeasured,
        "refold_of": revision(one.refold_of),
        "revoked": one.revoked,
        "replaced_by": revision(one.replaced_by),
        "created_ms": one.created_ms,
    })
}

fn to_text(one: &Checkpoint, bytes: u64) -> String {
    let spectrum = spectrum::of(one);
    let or_dash = |text: &str| if text.is_empty() { "-" } else { text }.to_owned();
    let mut text = format!(
        "{} revision {} {}\nparent         {}\nround          {}\nmade           {}\n\
         bytes          {bytes}\ncontributions  {}\ngate loss      {}\naudit loss     {}\n\
         norm           {}\neffective rank {}\n",
        one.model,
        one.revision,
        one.commit,
        or_dash(&one.parent_commit),
        or_dash(&one.round_id),
        clock::date(one.created_ms),
        one.contributions,
        loss(one.gate_loss),
        loss(one.audit_loss),
        number(spectrum.norm, 4),
        number(spectrum.effective_rank, 2),
    );
    if let Some(compressed) = &spectrum.compressed {
        text.push_str(&format!(
            "at rank {:<6} relative error {:.4}\n",
            compressed.rank, compressed.relative_error
        ));
    }
    for line in [remark(one), spectrum.unmeasured.clone()] {
        if !line.is_empty() {
            text.push_str(&format!("note           {line}\n"));
        }
    }
    let rows: Vec<Vec<String>> = spectrum
        .modules
        .iter()
        .map(|one| {
            vec![
                one.module.clone(),
                number(Some(one.norm), 4),
                number(Some(one.effective_rank), 2),
            ]
        })
        .collect();
    if !rows.is_empty() {
        text.push('\n');
        text.push_str(&table(&["module", "norm", "effective rank"], &rows));
    }
    text.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_says_what_was_measured_and_what_was_revoked() {
        let one = Checkpoint {
            model: "trail".to_owned(),
            revision: 4,
            refold_of: 2,
            revoked: 1,
            replaced_by: 6,
            spectrum_json: r#"{"norm":2.5,"effective_rank":7.25,"modules":[{"module":"m","norm":2.5,"effective_rank":7.25}],"compressed":{"rank":8,"relative_error":0.125}}"#.to_owned(),
            ..Checkpoint::default()
        };
        let text = to_text(&one, 9);
        for part in [
            "norm           2.5000",
            "at rank 8      relative error 0.1250",
            "revision 2 without what was revoked; 1 of its contributions revoked; use 6",
            "m       2.5000            7.25",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        let json = to_json(&one);
        assert_eq!(
            (&json["refold_of"], &json["replaced_by"]),
            (&json!(2), &json!(6))
        );
        let base = to_json(&Checkpoint::default());
        assert_eq!(
            (&base["norm"], &base["refold_of"]),
            (&Value::Null, &Value::Null)
        );
    }
}
