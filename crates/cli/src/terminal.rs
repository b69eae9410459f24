//! This process's terminal: its size, and its raw mode, which is taken back on every way out.

use std::io::{self, IsTerminal as _};
use std::sync::{Mutex, Once, PoisonError};

use funtainer_contract::terminal::TerminalSize;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// What programs take for a terminal's size that nobody knows.
const SIZE_DEFAULT: TerminalSize = TerminalSize { rows: 24, columns: 80 };

/// The mode to go back to, while the terminal is raw.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);
static HOOK: Once = Once::new();

/// Whether standard input is a terminal.
pub(crate) fn is_here() -> bool {
    io::stdin().is_terminal()
}

/// Size of the terminal that output goes to, or input comes from.
pub(crate) fn size() -> TerminalSize {
    let known = tcgetwinsize(io::stdout()).or_else(|_| tcgetwinsize(io::stdin()));
    match known {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => TerminalSize { rows: size.ws_row, columns: size.ws_col },
        _ => SIZE_DEFAULT,
    }
}

/// The terminal of standard input passes every key on, as long as this lives. A panic takes the raw mode back, too; ways out past that are
/// `_exit` and SIGKILL alone.
#[derive(Debug)]
pub(crate) struct Raw(());

impl Raw {
    pub(crate) fn enter() -> io::Result<Self> {
        HOOK.call_once(|| {
            let before = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                restore();
                before(panic);
            }));
        });
        let mode = tcgetattr(io::stdin())?;
        let mut raw = mode.clone();
        raw.make_raw();
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some(mode);
        let raw = tcsetattr(io::stdin(), OptionalActions::Now, &raw);
        // From here on a failure leaves through the drop.
        let entered = Self(());
        raw?;
        Ok(entered)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    let mode = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(mode) = mode {
        // A terminal that is gone needs no mode. What was written in the old one is waited for.
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &mode);
    }
}
