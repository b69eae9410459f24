//! Rules on the text of a source file.

use super::Offence;

/// Longest source file: more has more than one subject.
const LINES_MAX: usize = 800;
/// Lines above an `unsafe` block in which its `SAFETY:` comment must start.
const SAFETY_LINES: usize = 12;
/// The only crate with `unsafe`, and the program that attacks it by system calls which no library wraps.
const UNSAFE_PLACES: [&str; 2] = ["crates/sandbox/", "crates/e2e/src/bin/attacker/"];
/// Tests under tokio's paused clock, where a sleep takes no time: it says which moment of virtual time a test is about.
const VIRTUAL_TIME: &str = "crates/engine/tests/";
/// This file names what it forbids.
const RULES: &str = "crates/xtask/src/tidy/source.rs";

/// What a source must not contain, in code or in comments, and what to do instead.
const FORBIDDEN: [(&str, &str); 6] = [
    ("#[allow(", "write #[expect(.., reason = \"..\")], which says when it has become needless"),
    ("#![allow(", "write #![expect(.., reason = \"..\")], which says when it has become needless"),
    ("TODO", "do it, or file an issue"),
    ("FIXME", "do it, or file an issue"),
    ("#[ignore", "a test that does not run proves nothing: make it pass, or take it out"),
    ("unimplemented!(", "implement it"),
];

/// Offences of one file; `name` is its path in the repository.
pub(super) fn check(name: &str, text: &str) -> Vec<Offence> {
    let mut offences = Vec::new();
    let count = text.lines().count();
    if count > LINES_MAX {
        offences.push(Offence::new(name, format!("{count} lines, at most {LINES_MAX}: split it by subject")));
    }
    if name == RULES {
        return offences;
    }
    let waits = name.starts_with("crates/") && name.contains("/tests/");
    let lines: Vec<_> = text.lines().collect();
    for (index, line) in lines.iter().enumerate() {
        let mut offend = |rule: &str| offences.push(Offence::new(format!("{name}:{}", index + 1), rule));
        for (word, instead) in FORBIDDEN {
            if line.contains(word) {
                offend(&format!("'{word}': {instead}"));
            }
        }
        if waits && sleeps(name, code(line)) {
            offend("a test that sleeps is slow, or fails on a slow machine: wait for the event");
        }
        if name.starts_with(VIRTUAL_TIME) && line.contains("#[tokio::test") && !line.contains("start_paused = true") {
            offend("a test here runs with start_paused = true: its sleeps are moments of virtual time");
        }
        if is_unsafe(line) {
            if !may_be_unsafe(name) {
                offend("'unsafe' belongs into crates/sandbox");
            }
            let above = &lines[index.saturating_sub(SAFETY_LINES)..=index];
            if !above.iter().any(|line| line.contains("SAFETY:") || line.contains("# Safety")) {
                offend("'unsafe' without a comment '// SAFETY:' that says why it holds");
            }
        }
    }
    offences
}

/// Offences of the first file of a crate.
pub(super) fn check_root(name: &str, text: &str) -> Vec<Offence> {
    let forbids = text.lines().any(|line| line.trim() == "#![forbid(unsafe_code)]");
    if forbids || may_be_unsafe(name) {
        return Vec::new();
    }
    vec![Offence::new(name, "the crate does not say #![forbid(unsafe_code)]")]
}

fn may_be_unsafe(name: &str) -> bool {
    UNSAFE_PLACES.iter().any(|place| name.starts_with(place))
}

/// Whether a line sleeps in real time.
fn sleeps(name: &str, code: &str) -> bool {
    let code = if name.starts_with(VIRTUAL_TIME) { code.replace("tokio::time::sleep(", "") } else { code.to_owned() };
    code.contains("sleep(")
}

/// The part of a line before a comment; literals are not understood, which only makes the rules stricter.
fn code(line: &str) -> &str {
    line.split_once("//").map_or(line, |(code, _)| code)
}

/// Whether a line has an unsafe block, function, implementation or trait; an attribute or a lint of that name is none.
fn is_unsafe(line: &str) -> bool {
    let code = code(line);
    code.match_indices("unsafe").any(|(at, word)| {
        let before = code[..at].chars().next_back();
        let after = code[at + word.len()..].trim_start();
        let whole = !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '"');
        whole && ["{", "fn", "impl", "extern", "trait"].iter().any(|start| after.starts_with(start))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(name: &str, text: &str) -> usize {
        check(name, text).len()
    }

    #[test]
    fn long_files_are_offences() {
        assert_eq!(rules("crates/a/src/lib.rs", &"x\n".repeat(LINES_MAX)), 0);
        assert_eq!(rules("crates/a/src/lib.rs", &"x\n".repeat(LINES_MAX + 1)), 1);
        assert_eq!(rules(RULES, &"x\n".repeat(LINES_MAX + 1)), 1);
    }

    #[test]
    fn open_ends_are_offences() {
        for (word, _) in FORBIDDEN {
            assert_eq!(rules("crates/a/src/lib.rs", &format!("fn f() {{}}\n{word} dead_code)]\n")), 1, "{word}");
        }
        assert_eq!(rules("crates/a/src/lib.rs", "#[expect(dead_code, reason = \"x\")]\n"), 0);
    }

    #[test]
    fn unsafe_is_for_the_sandbox_and_says_why() {
        let bare = "fn f() {\n    unsafe { g() }\n}\n";
        let said = "fn f() {\n    // SAFETY: g has no preconditions.\n    unsafe { g() }\n}\n";
        assert_eq!(rules("crates/sandbox/src/a.rs", bare), 1);
        assert_eq!(rules("crates/sandbox/src/a.rs", said), 0);
        assert_eq!(rules("crates/e2e/src/bin/attacker/kernel.rs", said), 0);
        assert_eq!(rules("crates/image/src/a.rs", said), 1);
        assert_eq!(rules("crates/e2e/src/bin/bench/main.rs", said), 1);
        assert_eq!(rules("crates/image/src/a.rs", bare), 2);
        assert_eq!(rules("crates/sandbox/src/a.rs", "unsafe impl Send for X {}\n"), 1);
        assert_eq!(
            rules("crates/image/src/a.rs", "#![forbid(unsafe_code)]\n// unsafe { } in a comment\nlet unsafe_thing = 1;\n"),
            0
        );
        let far = format!("// SAFETY: too far away\n{}unsafe {{ g() }}\n", "\n".repeat(SAFETY_LINES));
        assert_eq!(rules("crates/sandbox/src/a.rs", &far), 1);
    }

    #[test]
    fn tests_do_not_sleep() {
        assert_eq!(rules("crates/e2e/tests/a.rs", "thread::sleep(d);\n"), 1);
        assert_eq!(rules("crates/contract/tests/deep/a.rs", "tokio::time::sleep(d).await;\n"), 1);
        assert_eq!(rules("crates/engine/tests/deep/a.rs", "tokio::time::sleep(d).await;\n"), 0);
        assert_eq!(rules("crates/engine/tests/deep/a.rs", "std::thread::sleep(d);\n"), 1);
        assert_eq!(rules("crates/engine/tests/deep/a.rs", "#[tokio::test]\n"), 1);
        assert_eq!(rules("crates/engine/tests/deep/a.rs", "#[tokio::test(start_paused = true)]\n"), 0);
        assert_eq!(rules("crates/engine/src/a.rs", "tokio::time::sleep(d).await;\n"), 0);
        assert_eq!(rules("crates/e2e/tests/a.rs", "// no sleep(1) here\nrun([\"sleep\", \"1\"]);\n"), 0);
    }

    #[test]
    fn roots_forbid_unsafe() {
        assert_eq!(check_root("crates/image/src/lib.rs", "//! x\n").len(), 1);
        assert_eq!(check_root("crates/image/src/lib.rs", "//! x\n// #![forbid(unsafe_code)]\n").len(), 1);
        assert_eq!(check_root("crates/image/src/lib.rs", "//! x\n#![forbid(unsafe_code)]\n").len(), 0);
        assert_eq!(check_root("crates/sandbox/src/lib.rs", "//! x\n").len(), 0);
    }
}
