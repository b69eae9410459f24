//! The standard streams. Whoever closed standard output has seen enough: that is no failure.

use std::fs;
use std::io::{self, Write};
use std::os::fd::AsFd;

use anyhow::Context as _;
use serde::Serialize;
use tokio::fs::File;
use tokio::io::AsyncWriteExt;

use crate::failure::OutputClosed;

/// Writes a line.
pub(crate) fn line(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    closed_is_known(writeln!(stdout, "{text}").and_then(|()| stdout.flush()))
}

/// Writes a line to standard error. Nobody need read it.
pub(crate) fn error_line(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Writes JSON, indented, with a line end.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    line(&serde_json::to_string_pretty(value)?)
}

/// Writes rows under a heading, each column as wide as its widest cell.
pub(crate) fn table<const N: usize>(heading: [&str; N], rows: &[[String; N]]) -> anyhow::Result<()> {
    line(&table_text(heading, rows))
}

/// Standard input, output and error for a runtime; reads and writes are done by its blocking threads.
pub(crate) fn stdin() -> io::Result<File> {
    of(io::stdin())
}

/// See [`stdin`].
pub(crate) fn stdout() -> io::Result<File> {
    of(io::stdout())
}

/// See [`stdin`].
pub(crate) fn stderr() -> io::Result<File> {
    of(io::stderr())
}

fn of(stream: impl AsFd) -> io::Result<File> {
    Ok(File::from_std(fs::File::from(stream.as_fd().try_clone_to_owned()?)))
}

/// Writes bytes at once.
pub(crate) async fn bytes(stream: &mut File, bytes: &[u8]) -> anyhow::Result<()> {
    let written = async {
        stream.write_all(bytes).await?;
        stream.flush().await
    };
    closed_is_known(written.await)
}

fn closed_is_known(result: io::Result<()>) -> anyhow::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(OutputClosed.into()),
        result => result.context("the output cannot be written"),
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
