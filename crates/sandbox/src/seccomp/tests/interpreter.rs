//! Runs a program as the kernel does: ours, and those of libseccomp.

use libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_JA, BPF_JEQ, BPF_JGE, BPF_JGT, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter,
};

/// `struct seccomp_data` as words of 32 bits, little endian: number, architecture, instruction pointer, arguments.
pub(super) fn data(architecture: u32, number: u32, arguments: [u64; 6]) -> [u32; 16] {
    let mut words = [0; 16];
    words[0] = number;
    words[1] = architecture;
    words[2] = 0xDEAD_BEEF;
    for (index, argument) in arguments.into_iter().enumerate() {
        words[4 + 2 * index] = argument as u32;
        words[5 + 2 * index] = (argument >> 32) as u32;
    }
    words
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// What the program returned.
    pub(super) value: u32,
    /// How many instructions it took.
    pub(super) steps: usize,
    /// Which words of the data it looked at, as bits.
    pub(super) looked_at: u16,
}

/// Runs a program. Panics at what the kernel would refuse to load.
pub(super) fn interpret(program: &[sock_filter], data: &[u32; 16]) -> Run {
    let mut accumulator = 0_u32;
    let mut place = 0;
    let mut looked_at = 0;
    for steps in 1..=program.len() {
        let sock_filter { code, jt, jf, k } = program[place];
        place += 1;
        let branch = |holds: bool| usize::from(if holds { jt } else { jf });
        match u32::from(code) {
            code if code == BPF_LD | BPF_W | BPF_ABS => {
                assert!(k % 4 == 0, "loads are of whole words");
                accumulator = data[k as usize / 4];
                looked_at |= 1 << (k / 4);
            }
            code if code == BPF_ALU | BPF_AND | BPF_K => accumulator &= k,
            code if code == BPF_RET | BPF_K => return Run { value: k, steps, looked_at },
            code if code == BPF_JMP | BPF_JA => place += k as usize,
            code if code == BPF_JMP | BPF_JEQ | BPF_K => place += branch(accumulator == k),
            code if code == BPF_JMP | BPF_JGE | BPF_K => place += branch(accumulator >= k),
            code if code == BPF_JMP | BPF_JGT | BPF_K => place += branch(accumulator > k),
            code if code == BPF_JMP | BPF_JSET | BPF_K => place += branch(accumulator & k != 0),
            code => panic!("instruction {code:#x} is not one of ours or of libseccomp's"),
        }
    }
    panic!("the program does not end");
}
