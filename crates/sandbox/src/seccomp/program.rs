//! The compiler: from a profile to a program of classic BPF (Linux Documentation/networking/filter.rst).

use std::collections::BTreeMap;

use libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_JA, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter,
};

use super::profile::{Check, Profile, Test};
use super::{ABSENT, ARCHITECTURE, DENIED, Verdict};

/// Offsets in `struct seccomp_data`: number, architecture, instruction pointer, six arguments of 64 bits.
const NUMBER: u32 = 0;
const ARCHITECTURE_OFFSET: u32 = 4;
const ARGUMENTS: u32 = 16;

/// From here on numbers are those of x32, a second set of calls on x86_64; no other architecture has calls there.
const FOREIGN: u32 = 0x4000_0000;
/// The number -1: a tracer's way to skip a call. The kernel answers `ENOSYS` by itself on every architecture.
const SKIPPED: u32 = u32::MAX;

/// Furthest conditional jump: offsets have eight bits.
const JUMP_MAX: usize = 255;

/// What is done with one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    Say(Verdict),
    Check(Check),
}

/// Numbers from `first` up to the next range's.
#[derive(Debug, Clone, Copy)]
struct Range {
    first: u32,
    rule: Rule,
}

/// Compiles a profile. The architecture comes first, then the number by a tree, then arguments.
pub(super) fn compile(profile: &Profile) -> Vec<sock_filter> {
    let mut program = vec![load(ARCHITECTURE_OFFSET), jump(BPF_JEQ, ARCHITECTURE, 1, 0), say(Verdict::Kill), load(NUMBER)];
    program.extend(tree(&ranges(profile)));
    program
}

/// The verdicts as ranges of equal rules, over all numbers from 0 to `u32::MAX`. Each checked call is a range of its own.
fn ranges(profile: &Profile) -> Vec<Range> {
    let mut rules = BTreeMap::new();
    let said = [(profile.allowed, Verdict::Allow), (profile.denied, DENIED)];
    let said = said.into_iter().flat_map(|(lists, verdict)| {
        lists.iter().flat_map(|list| list.iter()).map(move |call| (call.number, Rule::Say(verdict)))
    });
    for (number, rule) in said.chain(profile.checked.iter().map(|check| (check.call.number, Rule::Check(*check)))) {
        let before = rules.insert(number, rule);
        assert!(before.is_none() && number < FOREIGN, "system call {number} stands twice in the profile, or is none");
    }
    rules.insert(FOREIGN, Rule::Say(Verdict::Kill));

    let mut ranges: Vec<Range> = Vec::new();
    let mut push = |first, rule| match ranges.last() {
        Some(last) if last.rule == rule => {}
        _ => ranges.push(Range { first, rule }),
    };
    let mut next = 0;
    for (number, rule) in rules {
        if number > next {
            push(next, Rule::Say(ABSENT));
        }
        push(number, rule);
        next = number + 1;
        if number == FOREIGN {
            push(SKIPPED, Rule::Say(ABSENT));
        }
    }
    ranges
}

/// Instructions that decide over a sequence of ranges, the number being loaded. They end on every path.
fn tree(ranges: &[Range]) -> Vec<sock_filter> {
    if let [only] = ranges {
        return leaf(only.rule);
    }
    let (low, high) = ranges.split_at(ranges.len() / 2);
    let middle = high[0].first;
    let (low, high) = (tree(low), tree(high));
    let mut code = match u8::try_from(low.len()) {
        Ok(distance) => vec![jump(BPF_JGE, middle, distance, 0)],
        // Too far: over an unconditional jump, whose distance has 32 bits.
        Err(_) => vec![jump(BPF_JGE, middle, 0, 1), instruction(BPF_JMP | BPF_JA, low.len() as u32, 0, 0)],
    };
    code.extend(low);
    code.extend(high);
    code
}

fn leaf(rule: Rule) -> Vec<sock_filter> {
    match rule {
        Rule::Say(verdict) => vec![say(verdict)],
        Rule::Check(check) => argument(check),
    }
}

/// Loads an argument and compares. The verdicts stand at the end: allowed, denied.
fn argument(check: Check) -> Vec<sock_filter> {
    // Both served architectures are little endian: the lower half stands first.
    let mut code = vec![load(ARGUMENTS + 8 * u32::from(check.argument))];
    match check.test {
        Test::AllClear(mask) => code.push(jump(BPF_JSET, mask, 1, 0)),
        Test::Masked { mask, value } => {
            code.extend([instruction(BPF_ALU | BPF_AND | BPF_K, mask, 0, 0), jump(BPF_JEQ, value, 0, 1)]);
        }
        Test::OneOf(values) => {
            // From value i: over those that follow it, to "allowed"; after the last one falls to "denied".
            assert!(!values.is_empty() && values.len() < JUMP_MAX, "a check needs values, fewer than {JUMP_MAX}");
            for (index, value) in values.iter().enumerate() {
                let left = values.len() - 1 - index;
                code.push(jump(BPF_JEQ, *value, left as u8, u8::from(left == 0)));
            }
        }
        Test::NoneOf(values) => {
            assert!(values.len() < JUMP_MAX, "a check has fewer than {JUMP_MAX} values");
            for (index, value) in values.iter().enumerate() {
                code.push(jump(BPF_JEQ, *value, (values.len() - index) as u8, 0));
            }
        }
    }
    code.extend([say(Verdict::Allow), say(DENIED)]);
    code
}

fn load(offset: u32) -> sock_filter {
    instruction(BPF_LD | BPF_W | BPF_ABS, offset, 0, 0)
}

fn say(verdict: Verdict) -> sock_filter {
    instruction(BPF_RET | BPF_K, verdict.code(), 0, 0)
}

/// Goes on `yes` instructions further if the comparison with `value` holds, else `no` further.
fn jump(comparison: u32, value: u32, yes: u8, no: u8) -> sock_filter {
    instruction(BPF_JMP | comparison | BPF_K, value, yes, no)
}

fn instruction(code: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code: code as u16, jt, jf, k }
}
