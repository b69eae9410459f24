//! Our filter against Docker's: for every number and each argument that either looks at, what our program says is what libseccomp's program
//! of Docker's default profile says for a container with our capabilities, but for [`DIFFERENCES`], none of which lets more through.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::process::{Command, Stdio};

use libc::{BPF_JEQ, BPF_JGE, BPF_JGT, BPF_JMP, BPF_JSET, BPF_K, sock_filter};

use super::interpreter::{Run, data, interpret};
use crate::seccomp::{ABSENT, ARCHITECTURE, DEFAULT, DENIED, Filter, Verdict};
use crate::userns;

/// Where ours says something else.
struct Difference {
    /// `None` for all numbers that our profile does not name.
    call: Option<&'static str>,
    /// For which values of the argument that is looked at.
    values: Values,
    ours: Verdict,
    theirs: Verdict,
    /// Why. Shown when the comparison fails.
    reason: &'static str,
}

enum Values {
    All,
    These(&'static [u32]),
    AllBut(&'static [u32]),
}

impl Values {
    fn contain(&self, value: u32) -> bool {
        match self {
            Self::All => true,
            Self::These(values) => values.contains(&value),
            Self::AllBut(values) => !values.contains(&value),
        }
    }
}

/// AF_UNIX, AF_INET, AF_INET6, AF_NETLINK.
const FAMILIES: &[u32] = &[1, 2, 10, 16];

const DIFFERENCES: &[Difference] = &[
    Difference {
        call: None,
        values: Values::All,
        ours: ABSENT,
        theirs: DENIED,
        reason: "runc answers ENOSYS to numbers that are newer than the profile, we to all that it does not name: C libraries fall back",
    },
    Difference {
        call: Some("socket"),
        values: Values::AllBut(FAMILIES),
        ours: DENIED,
        theirs: Verdict::Allow,
        reason: "each further family is a module that asking for it may load; AF_PACKET and AF_XDP would read the wire",
    },
    Difference {
        call: Some("socketpair"),
        values: Values::AllBut(FAMILIES),
        ours: DENIED,
        theirs: Verdict::Allow,
        reason: "the families of `socket`",
    },
    Difference {
        call: Some("ioctl"),
        values: Values::These(&[0x5412, 0x541C, 0x541D, 0x5423]),
        ours: DENIED,
        theirs: Verdict::Allow,
        reason: "TIOCSTI types into a terminal, TIOCLINUX pastes, TIOCCONS takes the console, TIOCSETD loads modules",
    },
];

/// Compiles the reference by libseccomp.
fn reference(architectures: &str) -> Vec<sock_filter> {
    // The system's own interpreter: another one has no module of Debian's.
    let mut child = Command::new("/usr/bin/python3")
        .args(["-", architectures])
        .args(capabilities())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 is installed");
    let script = include_str!("reference.py");
    child.stdin.take().expect("a pipe").write_all(script.as_bytes()).expect("python3 reads its program");
    let said = child.wait_with_output().expect("python3 ends");
    assert!(said.status.success(), "python3-seccomp and golang-go are needed: `cargo xtask test` installs them");
    let instruction = |bytes: &[u8]| match *bytes {
        [code_low, code_high, jt, jf, a, b, c, d] => {
            sock_filter { code: u16::from_le_bytes([code_low, code_high]), jt, jf, k: u32::from_le_bytes([a, b, c, d]) }
        }
        _ => panic!("an instruction has eight bytes"),
    };
    assert!(said.stdout.len() > 1000, "{} bytes are no filter", said.stdout.len());
    said.stdout.chunks(8).map(instruction).collect()
}

/// What is kept, by the names of the profile.
fn capabilities() -> Vec<String> {
    userns::KEPT.iter_names().map(|(name, _)| format!("CAP_{name}")).collect()
}

/// Values at which a comparison in a program can turn: the constants that either compares with, what is next to them, and single bits.
fn turning_points(programs: [&[sock_filter]; 2]) -> BTreeSet<u32> {
    let compares = [BPF_JEQ, BPF_JGE, BPF_JGT, BPF_JSET].map(|test| BPF_JMP | test | BPF_K);
    let constants = programs.into_iter().flatten().filter(|instruction| compares.contains(&u32::from(instruction.code)));
    let constants: Vec<u32> = constants.map(|instruction| instruction.k).collect();
    let near = constants.iter().flat_map(|value| [*value, value.wrapping_add(1), value.wrapping_sub(1), !value]);
    near.chain((0..32).map(|bit| 1 << bit)).chain(0..64).collect()
}

/// The argument that a run looked at, if any.
fn argument_of(run: Run) -> Option<usize> {
    let words = run.looked_at >> 4;
    (words != 0).then(|| (words.trailing_zeros() / 2) as usize)
}

#[test]
fn every_verdict_is_that_of_dockers_profile_or_a_stricter_one_with_a_reason() {
    let (ours, theirs) = (Filter::compile(&DEFAULT), reference("native"));
    let ours = ours.instructions();
    let points = turning_points([ours, &theirs]);
    let lists = DEFAULT.allowed.iter().chain(DEFAULT.denied).copied().flatten();
    let names: BTreeMap<u32, &str> =
        lists.chain(DEFAULT.checked.iter().map(|check| &check.call)).map(|call| (call.number, call.name)).collect();
    let mut met = [0_usize; DIFFERENCES.len()];
    let mut swept = BTreeSet::new();
    let mut compare = |number: u32, value: u32, arguments: [u64; 6]| {
        let data = data(ARCHITECTURE, number, arguments);
        let (own, other) = (interpret(ours, &data), interpret(&theirs, &data));
        let name = names.get(&number).copied();
        if own.value != other.value {
            let known = DIFFERENCES.iter().position(|difference| {
                difference.call == name
                    && difference.values.contain(value)
                    && (difference.ours.code(), difference.theirs.code()) == (own.value, other.value)
            });
            let known = known.unwrap_or_else(|| {
                panic!("{number} ({name:?}) with {value:#x}: ours says {:#x}, Docker's {:#x}", own.value, other.value)
            });
            met[known] += 1;
        }
        argument_of(own).or(argument_of(other))
    };
    for number in (0..1024).chain([1 << 16, 0x3FFF_FFFF]) {
        let Some(argument) = compare(number, 0, [0; 6]) else { continue };
        swept.insert(names[&number]);
        for value in &points {
            let mut arguments = [0; 6];
            arguments[argument] = u64::from(*value);
            assert_eq!(compare(number, *value, arguments), Some(argument), "{number} looks at one argument");
        }
    }
    assert_eq!(swept, BTreeSet::from(["clone", "ioctl", "personality", "socket", "socketpair"]));
    for (difference, met) in DIFFERENCES.iter().zip(met) {
        assert!(met > 0, "no difference any more: {:?}, {}", difference.call, difference.reason);
        assert_ne!(difference.ours, Verdict::Allow, "{:?} must not be looser", difference.call);
    }
}

/// Docker lets programs of i386 and x32 run; ours are killed, by every number and whatever the arguments are.
#[test]
fn other_architectures_are_served_by_docker_and_killed_here() {
    const I386: u32 = 0x4000_0003;
    const X32: u32 = 0x4000_0000;
    let (ours, theirs) = (Filter::compile(&DEFAULT), reference("all"));
    let mut allowed_by_docker = [0; 2];
    for number in 0..1024 {
        for (index, (architecture, number)) in [(I386, number), (ARCHITECTURE, number | X32)].into_iter().enumerate() {
            for arguments in [[0; 6], [u64::MAX; 6]] {
                let data = data(architecture, number, arguments);
                assert_eq!(interpret(ours.instructions(), &data).value, Verdict::Kill.code(), "{architecture:#x} {number:#x}");
                allowed_by_docker[index] += usize::from(interpret(&theirs, &data).value == Verdict::Allow.code());
            }
        }
    }
    assert!(allowed_by_docker.iter().all(|count| *count > 300), "the reference has both: {allowed_by_docker:?}");
}

/// The kernel takes the arguments that are looked at as 32 bits: what stands above them changes nothing, neither way. (libseccomp compares
/// all 64 bits, and so refuses a call whose caller left something there.)
#[test]
fn the_upper_half_of_an_argument_changes_nothing() {
    let ours = Filter::compile(&DEFAULT);
    for check in DEFAULT.checked {
        for value in turning_points([ours.instructions(), &[]]) {
            let verdict = |upper: u64| {
                let mut arguments = [u64::MAX; 6];
                arguments[usize::from(check.argument)] = u64::from(value) | upper << 32;
                interpret(ours.instructions(), &data(ARCHITECTURE, check.call.number, arguments)).value
            };
            for upper in [1, 0x8000_0000, 0xFFFF_FFFF] {
                assert_eq!(verdict(upper), verdict(0), "{} with {value:#x}", check.call.name);
            }
        }
    }
}
