//! Papers that follow from the code are what the code says. `UPDATE_DOCS=1 cargo test -p funtainer-e2e --test docs` writes them anew.

use std::fmt::Write;
use std::fs;

use anyhow::{Context, Result, ensure};
use funtainer_e2e::paths;
use funtainer_model::{ErrorCode, Fault};

/// docs/errors.md, from the table of codes.
fn errors() -> String {
    let mut text = String::from(
        "# Errors

Every failure that a user can see has a code. Codes are stable: scripts can match on them. The command line and `curl` show

    error[CODE]: what happened, to which object
    hint: what to do next

and a program that sends `Accept: application/json` gets the same as RFC 9457 `application/problem+json` with the members `type`
(`urn:funtainer:error:CODE`), `title`, `status`, `detail`, `code`, `hint` and `call_id`. An answer of the platform, and none of a function, carries the header
`X-Funtainer-Error: CODE`.

*Fault* says where to look: the request (client), the image or its process (function), or this platform and what it depends on (platform). *Again* says
whether the same request can be sent again without harm and with hope.

<!-- Written by `UPDATE_DOCS=1 cargo test -p funtainer-e2e --test docs` from crates/model/src/error.rs. -->

| code | what happened | fault | again | what to do |
|---|---|---|---|---|
",
    );
    for code in ErrorCode::ALL {
        let fault = match code.fault() {
            Fault::Client => "client",
            Fault::Function => "function",
            Fault::Platform => "platform",
        };
        let again = if code.retry_is_safe() { "yes" } else { "no" };
        let _ = writeln!(text, "| `{code}` | {} | {fault} | {again} | {} |", code.title(), code.hint().replace('|', "\\|"));
    }
    text
}

#[test]
fn the_table_of_errors_is_current() -> Result<()> {
    let path = paths::repository().join("docs/errors.md");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, errors())?;
    }
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    ensure!(text == errors(), "docs/errors.md is stale: UPDATE_DOCS=1 cargo test -p funtainer-e2e --test docs");
    Ok(())
}

/// Links from one paper to another lead somewhere.
#[test]
fn links_between_papers_lead_somewhere() -> Result<()> {
    let top = paths::repository();
    let mut papers = vec![top.clone(), top.join("docs"), top.join("examples")];
    papers.retain(|path| path.exists());
    let mut checked = 0;
    for directory in papers {
        for entry in fs::read_dir(&directory)? {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "md") {
                continue;
            }
            let text = fs::read_to_string(&path)?;
            for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
                let file = target.split('#').next().unwrap_or_default();
                if file.is_empty() || file.contains("://") {
                    continue;
                }
                ensure!(directory.join(file).exists(), "{} links to {target}, which is not there", path.display());
                checked += 1;
            }
        }
    }
    ensure!(checked > 0, "no link was found: the test looks in the wrong place");
    Ok(())
}
