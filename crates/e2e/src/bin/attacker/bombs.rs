//! Using up: processes, memory, files, descriptors, logs, signals. Each goes on until it is refused or has what it asked for, and keeps it.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::process::{Child, Command, Stdio};

use crate::kernel::call;
use crate::{Attack, Loot, got};

pub(crate) const ATTACKS: &[Attack] = &[
    ("processes", processes),
    ("threads", threads),
    ("memory", memory),
    ("fill", fill),
    ("inodes", inodes),
    ("descriptors", descriptors),
    ("pipes", pipes),
    ("log", log),
    ("signals", signals),
    ("signal-init", signal_init),
    ("exhaust", exhaust),
    ("make-queue", |name| got(make_queue(name))),
];

/// So many; the argument of every bomb, `PATH:COUNT` where there is a path.
fn count(text: &str) -> io::Result<usize> {
    text.rsplit(':').next().unwrap_or_default().parse().map_err(io::Error::other)
}

/// Gets up to `wanted` things; what stopped it is the error.
fn gather<T>(what: &str, wanted: usize, mut next: impl FnMut(usize) -> io::Result<T>) -> io::Result<Vec<T>> {
    let mut gathered = Vec::new();
    while gathered.len() < wanted {
        match next(gathered.len()) {
            Ok(thing) => gathered.push(thing),
            Err(error) => {
                let said = format!("{} {what}, then {error}", gathered.len());
                drop(gathered);
                return Err(io::Error::new(error.kind(), said));
            }
        }
    }
    Ok(gathered)
}

/// Children that end when this process does.
fn processes(argument: &str) -> Loot {
    let mut children = Vec::new();
    let made = gather("processes", count(argument)?, |_| {
        let child =
            Command::new("/proc/self/exe").args(["--as-is", "wait"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        children.push(child);
        Ok(())
    });
    children.iter_mut().try_for_each(Child::kill)?;
    for mut child in children {
        child.wait()?;
    }
    made.map(|made| format!("{} processes at once", made.len()))
}

fn threads(argument: &str) -> Loot {
    let barrier = std::sync::Arc::new(std::sync::Mutex::new(()));
    let held = barrier.lock();
    let made = gather("threads", count(argument)?, |_| {
        let barrier = std::sync::Arc::clone(&barrier);
        std::thread::Builder::new().stack_size(64 << 10).spawn(move || drop(barrier.lock()))
    });
    drop(held);
    made.map(|made| format!("{} threads at once", made.len()))
}

/// Mebibytes of memory, touched.
fn memory(argument: &str) -> Loot {
    let wanted = count(argument)?;
    gather("mebibytes", wanted, |_| Ok(vec![1_u8; 1 << 20])).map(|blocks| format!("{} mebibytes of memory", blocks.len()))
}

/// `PATH:MEBIBYTES` into one file.
fn fill(argument: &str) -> Loot {
    let path = argument.split(':').next().unwrap_or_default();
    let mut file = File::create(path)?;
    let block = vec![1_u8; 1 << 20];
    let written = gather("mebibytes", count(argument)?, |_| file.write_all(&block));
    fs::remove_file(path)?;
    written.map(|blocks| format!("{} mebibytes in {path}", blocks.len()))
}

/// `DIRECTORY:COUNT` empty files.
fn inodes(argument: &str) -> Loot {
    let directory = argument.split(':').next().unwrap_or_default();
    let place = format!("{directory}/attacker-{}", std::process::id());
    fs::create_dir(&place)?;
    let made = gather("files", count(argument)?, |index| File::create(format!("{place}/{index}")).map(drop));
    fs::remove_dir_all(&place)?;
    made.map(|made| format!("{} files in {directory}", made.len()))
}

fn descriptors(argument: &str) -> Loot {
    gather("descriptors", count(argument)?, |_| File::open("/dev/null")).map(|files| format!("{} descriptors", files.len()))
}

/// Mebibytes in pipes whose buffers are as large as they are allowed to be, and full.
fn pipes(argument: &str) -> Loot {
    let block = vec![1_u8; 1 << 20];
    let mut open = Vec::new();
    gather("mebibytes in pipes", count(argument)?, |_| {
        let mut missing = block.len();
        while missing > 0 {
            let (reader, mut writer) = io::pipe()?;
            let fd = std::os::fd::AsRawFd::as_raw_fd(&writer);
            let size = call(libc::SYS_fcntl, [fd.into(), libc::F_SETPIPE_SZ.into(), (1_i64 << 20).into()])
                .or_else(|_| call(libc::SYS_fcntl, [fd.into(), libc::F_GETPIPE_SZ.into()]))?;
            writer.write_all(&block[..size as usize])?;
            missing = missing.saturating_sub(size as usize);
            open.push((reader, writer));
        }
        Ok(())
    })
    .map(|blocks| format!("{} mebibytes in pipes", blocks.len()))
}

/// Mebibytes of lines to standard error.
fn log(argument: &str) -> Loot {
    let block = "a line that is as long as many lines of many logs are, and says nothing\n".repeat((1 << 20) / 72);
    let mut stderr = io::stderr();
    gather("mebibytes", count(argument)?, |_| stderr.write_all(block.as_bytes()))
        .map(|blocks| format!("{} mebibytes", blocks.len()))
}

/// Signals that wait: each costs the kernel memory.
fn signals(argument: &str) -> Loot {
    queue_signals(count(argument)?).map(|sent| format!("{sent} signals wait"))
}

fn queue_signals(wanted: usize) -> io::Result<usize> {
    let number = libc::SIGRTMAX();
    let mut blocked = [0_u8; 8];
    blocked.copy_from_slice(&(1_u64 << (number - 1)).to_ne_bytes());
    call(libc::SYS_rt_sigprocmask, [libc::SIG_BLOCK.into(), blocked.as_slice().into(), 0.into(), 8.into()])?;
    let pid = i64::from(std::process::id());
    // siginfo_t with SI_QUEUE.
    let mut information = [0_u8; 128];
    information[8..12].copy_from_slice(&(-1_i32).to_ne_bytes());
    let sent = gather("signals", wanted, |_| {
        call(libc::SYS_rt_sigqueueinfo, [pid.into(), number.into(), information.as_slice().into()])
    })?;
    Ok(sent.len())
}

/// A message queue of the default size.
fn make_queue(name: &str) -> io::Result<i64> {
    let name = std::ffi::CString::new(name).unwrap_or_default();
    let flags = libc::O_RDWR | libc::O_CREAT;
    call(libc::SYS_mq_open, [(*name).into(), flags.into(), 0o666.into(), 0.into()])
}

/// What the kernel counts by user: all signals that may wait and all message queues. Says so, and stays until its input ends.
fn exhaust(_: &str) -> Loot {
    let refused = queue_signals(usize::MAX).err();
    let mut queues = Vec::new();
    while queues.len() < 10_000 {
        let name = format!("exhaust-{}-{}", std::process::id(), queues.len());
        match make_queue(&name) {
            Ok(_) => queues.push(name),
            Err(_) => break,
        }
    }
    println!("serves");
    io::copy(&mut io::stdin(), &mut io::sink())?;
    for name in &queues {
        let name = std::ffi::CString::new(name.as_str()).unwrap_or_default();
        call(libc::SYS_mq_unlink, [(*name).into()])?;
    }
    Ok(format!("{refused:?}, {} queues", queues.len()))
}

/// Every signal to pid 1, many times: through if that does not live.
fn signal_init(argument: &str) -> Loot {
    for _ in 0..count(argument)? {
        // Not SIGTERM, which the init hands on as it is asked to from outside.
        for signal in (1..=64).filter(|signal| ![libc::SIGTERM, 32, 33].contains(signal)) {
            let _ = call(libc::SYS_kill, [1.into(), signal.into()]);
        }
    }
    match fs::read_to_string("/proc/1/status") {
        Ok(status) if !status.contains("State:\tZ") && !status.contains("State:\tT") => Err(io::Error::other("pid 1 goes on")),
        other => Ok(format!("pid 1 does not: {other:?}")),
    }
}
