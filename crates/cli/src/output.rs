//! Standard output. Whoever closed it has seen enough: that is no failure.

use std::io::{self, Write};

use serde::Serialize;
use tokio::io::{AsyncWrite, AsyncWriteExt};

use crate::failure::OutputClosed;

/// Writes a line.
pub(crate) fn line(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    closed_is_known(writeln!(stdout, "{text}").and_then(|()| stdout.flush()))
}

/// Writes JSON, indented, with a line end.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    line(&serde_json::to_string_pretty(value)?)
}

/// Writes rows under a heading, each column as wide as its widest cell.
pub(crate) fn table<const N: usize>(heading: [&str; N], rows: &[[String; N]]) -> anyhow::Result<()> {
    line(&table_text(heading, rows))
}

/// Writes bytes at once.
pub(crate) async fn bytes(stdout: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> anyhow::Result<()> {
    let written = async {
        stdout.write_all(bytes).await?;
        stdout.flush().await
    };
    closed_is_known(written.await)
}

fn closed_is_known(result: io::Result<()>) -> anyhow::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(OutputClosed.into()),
        result => Ok(result?),
    }
}

fn table_text<const N: usize>(heading: [&str; N], rows: &[[String; N]]) -> String {
    let widths: [usize; N] = std::array::from_fn(|column| {
        rows.iter().map(|row| row[column].chars().count()).chain([heading[column].len()]).max().unwrap_or(0)
    });
    let text = |cells: [&str; N]| {
        let cells: Vec<_> = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    };
    let lines = rows.iter().map(|row| text(std::array::from_fn(|column| row[column].as_str())));
    std::iter::once(text(heading)).chain(lines).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::table_text;

    #[test]
    fn columns_are_aligned() {
        let rows = [["a".to_owned(), "long cell".to_owned()], ["bcd".to_owned(), String::new()]];
        assert_eq!(table_text(["X", "Y"], &rows), "X    Y\na    long cell\nbcd");
    }
}
