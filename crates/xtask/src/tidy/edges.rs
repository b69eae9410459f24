//! The edges between the crates of the workspace (ARCHITECTURE.md, "Workspace").

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, Metadata};

use super::Offence;

/// The arrows of the diagram. A crate may also use what its neighbours may use.
const DIAGRAM: [(&str, &[&str]); 8] = [
    ("funtainer-cli", &["funtainer-gateway", "funtainer-backend-local"]),
    ("funtainer-gateway", &["funtainer-engine"]),
    ("funtainer-backend-local", &["funtainer-engine", "funtainer-image", "funtainer-sandbox"]),
    ("funtainer-engine", &["funtainer-contract"]),
    ("funtainer-contract", &["funtainer-model"]),
    ("funtainer-image", &["funtainer-model"]),
    ("funtainer-sandbox", &["funtainer-model"]),
    ("funtainer-model", &[]),
];
/// May use anything; nobody may use them.
const TOOLS: [&str; 2] = ["xtask", "funtainer-e2e"];

/// An edge from a package of the workspace to another.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Edge {
    from: String,
    to: String,
}

/// Edges between packages of the workspace; those that only tests use do not count.
pub(super) fn workspace_edges(metadata: &Metadata) -> Vec<Edge> {
    let members: BTreeSet<_> = metadata.workspace_packages().iter().map(|package| package.name.to_string()).collect();
    let mut edges = Vec::new();
    for package in metadata.workspace_packages() {
        for dependency in package.dependencies.iter().filter(|dependency| dependency.kind != DependencyKind::Development) {
            if members.contains(&dependency.name) {
                edges.push(Edge { from: package.name.to_string(), to: dependency.name.clone() });
            }
        }
    }
    edges
}

/// Edges that the diagram does not have.
pub(super) fn check(edges: &[Edge]) -> Vec<Offence> {
    let allowed = reachable();
    let mut offences = Vec::new();
    for Edge { from, to } in edges {
        if TOOLS.contains(&to.as_str()) {
            offences.push(Offence::new(from, format!("nobody may depend on {to}")));
        } else if !TOOLS.contains(&from.as_str())
            && !allowed.get(from.as_str()).is_some_and(|targets| targets.contains(to.as_str()))
        {
            offences
                .push(Offence::new(from, format!("must not depend on {to}: the diagram in ARCHITECTURE.md has no such arrow")));
        }
    }
    offences
}

/// For each crate of the diagram everything that can be reached along its arrows.
fn reachable() -> BTreeMap<&'static str, BTreeSet<&'static str>> {
    let arrows: BTreeMap<_, _> = DIAGRAM.into_iter().collect();
    let mut all = BTreeMap::new();
    for (from, direct) in DIAGRAM {
        let mut open = direct.to_vec();
        let mut seen = BTreeSet::new();
        while let Some(next) = open.pop() {
            if seen.insert(next) {
                open.extend(arrows.get(next).copied().unwrap_or_default());
            }
        }
        all.insert(from, seen);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offends(from: &str, to: &str) -> bool {
        !check(&[Edge { from: from.into(), to: to.into() }]).is_empty()
    }

    #[test]
    fn arrows_and_what_is_behind_them_are_allowed() {
        for (from, to) in [
            ("funtainer-cli", "funtainer-gateway"),
            ("funtainer-cli", "funtainer-model"),
            ("funtainer-backend-local", "funtainer-contract"),
            ("funtainer-gateway", "funtainer-contract"),
            ("xtask", "funtainer-model"),
            ("funtainer-e2e", "funtainer-image"),
        ] {
            assert!(!offends(from, to), "{from} -> {to}");
        }
    }

    #[test]
    fn other_edges_are_offences() {
        for (from, to) in [
            ("funtainer-gateway", "funtainer-backend-local"),
            ("funtainer-gateway", "funtainer-image"),
            ("funtainer-engine", "funtainer-image"),
            ("funtainer-sandbox", "funtainer-image"),
            ("funtainer-model", "funtainer-contract"),
            ("funtainer-image", "funtainer-contract"),
            ("funtainer-contract", "funtainer-engine"),
            ("funtainer-cli", "funtainer-e2e"),
            ("funtainer-e2e", "xtask"),
            ("xtask", "funtainer-e2e"),
            ("funtainer-unheard-of", "funtainer-model"),
        ] {
            assert!(offends(from, to), "{from} -> {to}");
        }
    }
}
