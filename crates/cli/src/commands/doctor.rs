//! `doctor`: what this machine has and lacks, for people and for programs. No server is asked.

use std::path::Path;
use std::process::ExitCode;

use funtainer_sandbox::doctor::{self, Area, Finding, Report, State};
use serde_json::{Value, json};

use crate::args::{Doctor, Output};
use crate::streams;

/// Looks, and tells it. The exit code is 1 where no server can start. No thread may be there yet.
pub(crate) fn doctor(form: Output, doctor: &Doctor) -> anyhow::Result<ExitCode> {
    let data = doctor.data.clone().map_or_else(crate::places::data, Ok)?;
    let report = doctor::examine(&data);
    match form {
        Output::Json => streams::json(&value(&report, &data))?,
        Output::Text => streams::line(&text(&report))?,
    }
    Ok(if report.is_sound() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn value(report: &Report, data: &Path) -> Value {
    let findings: Vec<Value> = report
        .findings
        .iter()
        .map(|finding| {
            json!({
                "area": finding.area.name(),
                "feature": finding.feature,
                "state": finding.state.name(),
                "required": finding.required,
                "found": finding.found,
                "lost": finding.lost,
                "cure": finding.cure,
            })
        })
        .collect();
    let server_of = if report.root { "root" } else { "user" };
    json!({"sound": report.is_sound(), "server_of": server_of, "data": data, "findings": findings})
}

/// Columns for the eye: state, feature, what was found; below a fault what is lost by it and what helps.
fn text(report: &Report) -> String {
    let states = [State::Ok, State::Degraded, State::Missing, State::Unknown];
    let state_width = states.into_iter().map(|state| state.name().len()).max().unwrap_or(0);
    let feature_width = report.findings.iter().map(|finding| finding.feature.len()).max().unwrap_or(0);
    let row = |state: &str, feature: &str, said: &str| format!("  {state:state_width$}  {feature:feature_width$}  {said}");
    let mut lines = Vec::new();
    for area in Area::ALL {
        let findings: Vec<&Finding> = report.findings.iter().filter(|finding| finding.area == area).collect();
        if findings.is_empty() {
            continue;
        }
        lines.push(area.name().to_owned());
        for finding in findings {
            lines.push(row(finding.state.name(), finding.feature, &finding.found));
            for (label, said) in [("lost", &finding.lost), ("cure", &finding.cure)] {
                if let Some(said) = said {
                    lines.push(row("", "", &format!("{label}: {said}")));
                }
            }
        }
        lines.push(String::new());
    }
    lines.push(verdict(report));
    lines.join("\n")
}

fn verdict(report: &Report) -> String {
    let whose = if report.root { "root's server" } else { "a server of this user" };
    let missing: Vec<&str> = report
        .findings
        .iter()
        .filter(|finding| finding.required && finding.state == State::Missing)
        .map(|finding| finding.feature)
        .collect();
    if !missing.is_empty() {
        return format!("{whose} cannot start here without: {}", missing.join(", "));
    }
    let count = |state| report.findings.iter().filter(|finding| finding.state == state).count();
    let mut worse = Vec::new();
    for state in [State::Degraded, State::Missing, State::Unknown] {
        match count(state) {
            0 => {}
            number => worse.push(format!("{number} {}", state.name())),
        }
    }
    match worse.as_slice() {
        [] => format!("{whose} can start here, and has everything"),
        worse => format!("{whose} can start here; of what is not needed to start: {}", worse.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(area: Area, feature: &'static str, state: State, required: bool) -> Finding {
        let more = |text: &str| (state != State::Ok).then(|| text.to_owned());
        let found = "something".to_owned();
        Finding { area, feature, state, required, found, lost: more("a limit"), cure: more("modprobe it") }
    }

    fn report() -> Report {
        let findings = vec![
            finding(Area::Kernel, "version", State::Ok, true),
            finding(Area::Files, "erofs layers", State::Degraded, true),
            finding(Area::ControlGroups, "pids", State::Missing, false),
        ];
        Report { root: true, findings }
    }

    #[test]
    fn text_is_aligned_and_grouped() {
        insta::assert_snapshot!(text(&report()));
    }

    #[test]
    fn what_is_missing_is_named_last() {
        let mut report = report();
        report.findings.push(finding(Area::Kernel, "seccomp", State::Missing, true));
        assert_eq!(verdict(&report), "root's server cannot start here without: seccomp");
        report.findings.clear();
        report.root = false;
        assert_eq!(verdict(&report), "a server of this user can start here, and has everything");
    }

    #[test]
    fn programs_get_every_member() {
        let value = value(&report(), Path::new("/d"));
        assert_eq!((&value["sound"], &value["server_of"], &value["data"]), (&json!(true), &json!("root"), &json!("/d")));
        let expect = json!({
            "area": "control groups", "feature": "pids", "state": "missing", "required": false, "found": "something",
            "lost": "a limit", "cure": "modprobe it",
        });
        assert_eq!(value["findings"][2], expect);
        assert_eq!(value["findings"][0]["cure"], Value::Null);
    }
}
