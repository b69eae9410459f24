//! Failures of a command, and how they are said.

use std::io;

use funtainer_gateway::Problem;
use funtainer_sandbox::keeper::KeeperError;
use serde_json::json;

use crate::args::{Host, Output};

/// What the server reported.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.detail)]
pub(crate) struct Failed(pub(crate) Problem);

/// No server answers.
#[derive(Debug, thiserror::Error)]
#[error("no server answers at {host}: {source}")]
pub(crate) struct NotRunning {
    host: Host,
    source: io::Error,
}

/// Something that this process itself lacks.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub(crate) struct Unable {
    /// What.
    pub(crate) what: String,
    /// What to do next.
    pub(crate) hint: &'static str,
}

/// Standard output was closed by whoever read it, who has seen enough.
#[derive(Debug, thiserror::Error)]
#[error("standard output is closed")]
pub(crate) struct OutputClosed;

impl NotRunning {
    pub(crate) fn new(host: &Host, source: io::Error) -> Self {
        Self { host: host.clone(), source }
    }

    /// Whether there is no server at all, as far as can be seen.
    pub(crate) fn is_absence(&self) -> bool {
        matches!(self.source.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
    }

    fn hint(&self) -> &'static str {
        if self.source.kind() == io::ErrorKind::PermissionDenied {
            "the socket belongs to root and the group funtainer: use sudo, join the group, or start a server of your own with: funtainer serve"
        } else {
            "is the server running? start it with: funtainer serve (another place is given by --host or FUNTAINER_HOST)"
        }
    }
}

/// The text of a failure for standard error, without a line end.
pub(crate) fn said(error: &anyhow::Error, output: Output) -> String {
    let problem = error.downcast_ref::<Failed>().map(|Failed(problem)| problem);
    let hint = error
        .downcast_ref::<NotRunning>()
        .map(NotRunning::hint)
        .or_else(|| error.downcast_ref::<Unable>().map(|unable| unable.hint))
        .or_else(|| error.downcast_ref::<KeeperError>().and_then(hint_for_keeper));
    match output {
        Output::Json => {
            let value = match problem {
                Some(problem) => json!(problem),
                // RFC 9457 section 4.2.1: a problem without a type of its own.
                None => json!({"type": "about:blank", "title": "the command failed", "detail": chain(error), "hint": hint}),
            };
            value.to_string()
        }
        Output::Text => match (problem, hint) {
            (Some(problem), _) => format!("error[{}]: {}\nhint: {}", problem.code, problem.detail, problem.hint),
            (None, Some(hint)) => format!("error: {}\nhint: {hint}", chain(error)),
            (None, None) => format!("error: {}", chain(error)),
        },
    }
}

fn hint_for_keeper(error: &KeeperError) -> Option<&'static str> {
    match error {
        KeeperError::Listen { .. } => Some("choose another address with --listen; port 0 picks a free one"),
        KeeperError::AdminInUse { .. } => Some("stop that server, or choose another socket with --admin"),
        KeeperError::Locked { .. } => Some("stop that server, or choose another directory with --data"),
        KeeperError::Data { .. } | KeeperError::Foreign { .. } => Some("choose another directory with --data"),
        KeeperError::Admin { .. } => Some("choose another place with --admin"),
        KeeperError::Missing(_) | KeeperError::Cgroup(_) | KeeperError::Step(_) => {
            Some("`funtainer doctor` names everything that this machine lacks, and how to get it")
        }
        KeeperError::Range(_) => Some("choose another range with --network-range, or none for a free one"),
        KeeperError::Threads | KeeperError::Title(_) => None,
    }
}

fn chain(error: &anyhow::Error) -> String {
    let mut causes: Vec<String> = error.chain().map(ToString::to_string).collect();
    // A source that its error's text has already.
    causes.dedup_by(|next, before| before.contains(next.as_str()));
    causes.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_server_says_what_to_do() {
        let error = anyhow::Error::from(NotRunning::new(
            &Host::at(crate::places::ADMIN_OF_ROOT.into()),
            io::ErrorKind::NotFound.into(),
        ));
        let text = said(&error, Output::Text);
        assert!(text.contains("unix:///run/funtainer/admin.sock") && text.contains("funtainer serve"), "{text}");
        let json: serde_json::Value = serde_json::from_str(&said(&error, Output::Json)).unwrap();
        assert_eq!(json["type"], "about:blank");
    }
}
