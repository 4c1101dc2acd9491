//! Where results go: one JSON object per result on stdout with `--json`, a sentence or table
//! otherwise. Everything that is not a result goes to stderr.

use std::io::Write;

use anyhow::{Context, Result};
use serde::Serialize;

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// For people.
    Text,
    /// One JSON object per result.
    Json,
}

impl Output {
    /// Chooses by the `--json` flag.
    pub fn from_flag(json: bool) -> Self {
        if json { Self::Json } else { Self::Text }
    }

    /// Prints one result: `json` as a line, or what `text` says.
    pub fn result(self, json: &impl Serialize, text: impl FnOnce() -> String) -> Result<()> {
        let line = match self {
            Self::Json => serde_json::to_string(json).context("encode the result")?,
            Self::Text => text(),
        };
        let mut stdout = std::io::stdout().lock();
        writeln!(stdout, "{line}")
            .and_then(|()| stdout.flush())
            .context("write to stdout")
    }

    /// Prints a list: a JSON object per item, or one table.
    pub fn list<T>(
        self,
        items: &[T],
        header: &[&str],
        json: impl Fn(&T) -> serde_json::Value,
        row: impl Fn(&T) -> Vec<String>,
    ) -> Result<()> {
        match self {
            Self::Json => items
                .iter()
                .try_for_each(|item| self.result(&json(item), String::new)),
            Self::Text => {
                let rows: Vec<Vec<String>> = items.iter().map(row).collect();
                self.result(&(), || table(header, &rows))
            }
        }
    }
}

/// Lays out rows as columns two spaces apart; cells that look like numbers are set right.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = header.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let numeric: Vec<bool> = (0..header.len())
        .map(|column| {
            rows.iter()
                .all(|row| row.get(column).is_none_or(|cell| looks_numeric(cell)))
        })
        .collect();
    let line = |cells: &[String]| {
        let mut line = String::new();
        for (column, cell) in cells.iter().enumerate() {
            let width = widths.get(column).copied().unwrap_or(0);
            let right = numeric.get(column).copied().unwrap_or(false);
            line.push_str(&if right {
                format!("{cell:>width$}  ")
            } else {
                format!("{cell:<width$}  ")
            });
        }
        line.trim_end().to_owned()
    };
    let header: Vec<String> = header.iter().map(|&cell| cell.to_owned()).collect();
    let mut lines = vec![line(&header)];
    lines.extend(rows.iter().map(|row| line(row)));
    lines.join("\n")
}

fn looks_numeric(cell: &str) -> bool {
    cell.is_empty()
        || cell == "-"
        || cell.starts_with(|c: char| c.is_ascii_digit() || c == '+' || c == '-')
            && cell
                .chars()
                .all(|c| c.is_ascii_digit() || "+-.%eE".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = vec![
            vec!["base".to_owned(), "2.5000".to_owned()],
            vec!["round 1".to_owned(), "-".to_owned()],
        ];
        assert_eq!(
            table(&["what", "loss"], &rows),
            "what       loss\nbase     2.5000\nround 1       -"
        );
    }
}
