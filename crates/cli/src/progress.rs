//! Progress of long work on standard error: a line that is written over on a terminal, lines without numbers elsewhere.

use std::collections::BTreeSet;
use std::io::{IsTerminal, Write};

use funtainer_engine::backend::Progress;
use funtainer_model::Digest;

/// Says what is going on.
#[derive(Debug)]
pub(crate) enum Show {
    /// Nothing.
    Quiet,
    /// Each thing once.
    Lines(BTreeSet<Digest>),
    /// One line, written over. Whether there is one now.
    Live(bool),
}

impl Show {
    /// By what standard error is.
    pub(crate) fn new(quiet: bool) -> Self {
        if quiet {
            Self::Quiet
        } else if std::io::stderr().is_terminal() {
            Self::Live(false)
        } else {
            Self::Lines(BTreeSet::new())
        }
    }

    /// For a command whose standard error is somebody else's: a terminal's line is gone again before that begins.
    pub(crate) fn only_live(quiet: bool) -> Self {
        match Self::new(quiet) {
            Self::Lines(_) => Self::Quiet,
            show => show,
        }
    }

    /// Says a step.
    pub(crate) fn step(&mut self, step: &Progress) {
        if let Progress::Warning { text } = step {
            self.warning(text);
            return;
        }
        let text = match self {
            Self::Quiet => return,
            Self::Lines(seen) => line(step, seen).map(|text| format!("{text}\n")),
            Self::Live(open) => {
                *open = true;
                Some(format!("\r\x1b[K{}", live(step)))
            }
        };
        // Nobody need read it.
        let _ = std::io::stderr().write_all(text.unwrap_or_default().as_bytes());
    }

    /// Says a warning, which stays.
    fn warning(&mut self, text: &str) {
        if matches!(self, Self::Quiet) {
            return;
        }
        self.end();
        let _ = std::io::stderr().write_all(format!("warning: {text}\n").as_bytes());
    }

    /// Takes a live line away.
    pub(crate) fn end(&mut self) {
        if let Self::Live(open @ true) = self {
            *open = false;
            let _ = std::io::stderr().write_all(b"\r\x1b[K");
        }
    }
}

impl Drop for Show {
    fn drop(&mut self) {
        self.end();
    }
}

fn line(step: &Progress, seen: &mut BTreeSet<Digest>) -> Option<String> {
    match step {
        Progress::Resolved { digest } => Some(format!("resolved to {digest}")),
        Progress::Layer { layer, total, .. } => {
            seen.insert(*layer).then(|| format!("layer {} is fetched ({})", layer.short(), size(*total)))
        }
        Progress::LayerPresent { layer } => seen.insert(*layer).then(|| format!("layer {} is here", layer.short())),
        Progress::Starting => Some("an instance is started".to_owned()),
        Progress::Warning { text } => Some(text.clone()),
    }
}

fn live(step: &Progress) -> String {
    match step {
        Progress::Resolved { digest } => format!("resolved to {}", digest.short()),
        Progress::Layer { layer, bytes, total } => format!("layer {}: {} of {}", layer.short(), size(*bytes), size(*total)),
        Progress::LayerPresent { layer } => format!("layer {} is here", layer.short()),
        Progress::Starting => "starting an instance".to_owned(),
        Progress::Warning { text } => text.clone(),
    }
}

/// Bytes for people: powers of 1000, one digit behind the point.
pub(crate) fn size(bytes: u64) -> String {
    let (mut value, mut unit) = (bytes as f64, "B");
    for next in ["kB", "MB", "GB", "TB"] {
        if value < 1000.0 {
            break;
        }
        (value, unit) = (value / 1000.0, next);
    }
    if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!([0, 999, 1000, 12_345_678].map(size), ["0 B", "999 B", "1.0 kB", "12.3 MB"]);
    }

    #[test]
    fn a_layer_is_said_once() {
        let mut seen = BTreeSet::new();
        let layer = Digest::from_sha256([7; 32]);
        let steps = [1, 2, 3].map(|bytes| Progress::Layer { layer, bytes, total: 3 });
        assert_eq!(steps.iter().filter_map(|step| line(step, &mut seen)).count(), 1);
    }
}
