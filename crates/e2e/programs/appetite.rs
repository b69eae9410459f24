//! What takes of one resource until there is no more: for tests of limits.

use std::fs::{self, File};
use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::Instant;
use std::{hint, thread};

/// The paths of this module: what was had, and the error that ended it; `None` for another path.
pub fn answer(path: &str, query: &str) -> Option<String> {
    let (first, second) = query.split_once(',').unwrap_or((query, ""));
    let number = |text: &str| text.parse::<u64>().unwrap_or(0);
    Some(match path {
        "/burn" => burn(number(first)),
        "/spin" => spin(number(first)),
        "/threads" => threads(number(first)),
        "/open" => until_refused(number(first), |_| File::open("/dev/null")),
        "/fill" => fill(first, number(second)),
        "/files" => until_refused(number(second), |name| File::create(format!("{first}/{name}")).map(drop)),
        "/read" => read(first),
        _ => return None,
    })
}

/// Uses so many milliseconds of a processor; the time that it took in microseconds.
fn burn(millis: u64) -> String {
    let begun = Instant::now();
    let start = used();
    while used() - start < millis * 1_000_000 {
        for _ in 0..10_000 {
            hint::spin_loop();
        }
    }
    format!("{}\n", begun.elapsed().as_micros())
}

/// Processor time of this thread in nanoseconds (proc(5), `schedstat`).
fn used() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split_whitespace().next().and_then(|time| time.parse().ok()).unwrap_or(u64::MAX / 2)
}

/// Leaves so many threads behind that never rest.
fn spin(count: u64) -> String {
    for _ in 0..count {
        thread::spawn(|| {
            loop {
                hint::spin_loop();
            }
        });
    }
    "spinning\n".to_owned()
}

/// Threads that wait until all are made.
fn threads(count: u64) -> String {
    let gate = Arc::new(Mutex::new(()));
    let closed = gate.lock();
    let said = until_refused(count, |_| {
        let gate = Arc::clone(&gate);
        thread::Builder::new().stack_size(16 << 10).spawn(move || drop(gate.lock())).map(drop)
    });
    drop(closed);
    said
}

/// Makes one thing after the other, all of which are kept until the answer.
fn until_refused<T>(count: u64, make: impl Fn(u64) -> io::Result<T>) -> String {
    let mut kept = Vec::new();
    for number in 0..count {
        match make(number) {
            Ok(made) => kept.push(made),
            Err(error) => return format!("{} {error}\n", kept.len()),
        }
    }
    format!("{}\n", kept.len())
}

/// Writes so many MiB into a file; how many bytes there was room for.
fn fill(path: &str, mebibytes: u64) -> String {
    let piece = vec![b'x'; 64 << 10];
    let mut written = 0;
    let filled = File::create(path).and_then(|mut file| {
        while written < mebibytes << 20 {
            written += file.write(&piece)? as u64;
        }
        Ok(())
    });
    match filled {
        Ok(()) => format!("{written}\n"),
        Err(error) => format!("{written} {error}\n"),
    }
}

/// Reads a file, of which nothing is kept.
fn read(path: &str) -> String {
    let copied = File::open(path).and_then(|mut file| io::copy(&mut file, &mut io::sink()));
    match copied {
        Ok(bytes) => format!("{bytes}\n"),
        Err(error) => format!("0 {error}\n"),
    }
}
