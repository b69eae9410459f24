//! Tests that do not run in the guest, each with the reason. All others do: what is new runs on both kernels, unless it is named here.
//!
//! What the other kernel cannot change (a parser, a decision of the engine, an answer of the gateway) costs many times its time under
//! emulation and shows nothing.

use std::path::Path;

/// Tests of one program.
pub(super) struct LeftOut {
    /// The package.
    package: &'static str,
    /// The main source file of the test program, beneath the package; a directory for all in it.
    source: &'static str,
    /// Tests whose names contain this; nothing for the whole program.
    pub(super) test: Option<&'static str>,
    /// Why.
    pub(super) reason: &'static str,
}

const fn whole(source: &'static str, reason: &'static str) -> LeftOut {
    LeftOut { package: "funtainer-e2e", source, test: None, reason }
}

const fn test(source: &'static str, test: &'static str, reason: &'static str) -> LeftOut {
    LeftOut { package: "funtainer-e2e", source, test: Some(test), reason }
}

const LEFT_OUT: &[LeftOut] = &[
    LeftOut {
        package: "funtainer-sandbox",
        source: "src/lib.rs",
        test: Some("seccomp::tests::reference::"),
        reason: "compares two programs by an interpreter, the same on every kernel; needs Go's module proxy",
    },
    whole("src", "the tests of the tests' own parts are the host's"),
    whole("tests/bad_input.rs", "parsers and answers of the gateway"),
    whole("tests/docs.rs", "the papers"),
    whole("tests/harness.rs", "a registry, a load and a probe that no scenario here needs to trust"),
    whole("tests/rollout.rs", "decisions of the engine, under a load that emulation makes long"),
    whole("tests/systemd.rs", "needs systemd as process 1: the second boot has it"),
    test("tests/basics.rs", "from_a_registry_to_answered_calls_and_back_to_nothing", "the registry's client"),
    test("tests/basics.rs", "requests_arrive_as_they_were_sent", "the gateway's"),
    test("tests/basics.rs", "bodies_are_streamed_both_ways", "256 MiB through an emulated processor, in the gateway's code"),
    test("tests/basics.rs", "an_idle_function_runs_nothing_and_wakes", "the engine's clock"),
    test("tests/basics.rs", "a_full_queue_refuses_and_says_when_to_come_back", "decisions of the engine"),
    test("tests/basics.rs", "two_functions_share_the_layers_of_a_real_root_file_system", "makes a Debian by mmdebstrap"),
    test("tests/basics.rs", "many_functions_and_many_calls_at_once", "a load, not a kernel's feature"),
    test(
        "tests/crash.rs",
        "the_daemon_is_killed_again_and_again",
        "twelve daemons take minutes to start; one is killed by another test",
    ),
    test("tests/crash.rs", "a_second_server_in_the_same_place_is_refused", "files and ports, the same everywhere"),
    test(
        "tests/images.rs",
        "commands_that_cannot_run",
        "its images come from a registry; the sandbox's own tests have the errors of exec",
    ),
    test("tests/images.rs", "a_server_that_never_listens", "its image comes from a registry; a limit of the engine's"),
    test("tests/images.rs", "a_deaf_process_is_killed", "waits for ten seconds of the product's"),
    test("tests/images.rs", "images_that_are_not_there", "the registry's client"),
    test("tests/images.rs", "names_are_resolved_at_each_deploy_and_imports_are_kept", "the registry's client"),
    test("tests/layers.rs", "a_debian_root_file_system_is_kept_whole", "makes a Debian by mmdebstrap"),
    test("tests/layers.rs", "a_damaged_layer_is_refused", "the image store's"),
    test("tests/stdio.rs", "output_is_not_held_back_for_long", "compares times of an ordinary machine"),
];

/// What of a program does not run.
pub(super) fn of(package: &str, source: &Path) -> impl Iterator<Item = &'static LeftOut> {
    let directory = package.trim_start_matches("funtainer-");
    LEFT_OUT.iter().filter(move |left_out| {
        let place = Path::new("crates").join(directory).join(left_out.source);
        left_out.package == package && source.ancestors().any(|path| path.ends_with(&place))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A test that was renamed would run, or take its reason with it.
    #[test]
    fn what_is_left_out_exists_and_has_a_reason() {
        let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        for left_out in LEFT_OUT {
            let source = crates.join(left_out.package.trim_start_matches("funtainer-")).join(left_out.source);
            assert!(source.exists(), "{}", source.display());
            assert!(!left_out.reason.is_empty());
            if let Some(test) = left_out.test.filter(|test| !test.contains("::")) {
                let text = std::fs::read_to_string(&source).unwrap();
                assert!(text.contains(&format!("fn {test}()")), "{} has no {test}", source.display());
            }
        }
    }

    #[test]
    fn programs_and_tests_are_told_apart() {
        let source = |name: &str| Path::new("/somewhere/crates").join(name);
        let found = |package, name| of(package, &source(name)).map(|left_out| left_out.test).collect::<Vec<_>>();
        assert_eq!(found("funtainer-e2e", "e2e/tests/docs.rs"), [None]);
        assert_eq!(found("funtainer-e2e", "e2e/src/bin/bench/main.rs"), [None]);
        assert_eq!(found("funtainer-e2e", "e2e/tests/inside.rs"), []);
        assert_eq!(found("funtainer-e2e", "e2e/tests/layers.rs").len(), 2);
        assert_eq!(found("funtainer-sandbox", "sandbox/src/lib.rs"), [Some("seccomp::tests::reference::")]);
    }
}
