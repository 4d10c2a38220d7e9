//! The user's terminal: its size, and raw mode while a program in a VM has it. Whoever ends this process
//! calls [`restore`] first.

use onde_wire::session::Window;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use std::io::{self, stdin, stdout};
use std::sync::{Mutex, PoisonError};

/// How the terminal was before raw mode.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// The terminal's size; `None` where standard output is none.
pub fn window() -> Option<Window> {
    let size = tcgetwinsize(stdout()).ok()?;
    Some(Window { rows: size.ws_row, columns: size.ws_col })
}

/// Every key goes to the program, until [`restore`].
pub fn make_raw() -> io::Result<()> {
    let before = tcgetattr(stdin())?;
    let mut raw = before.clone();
    raw.make_raw();
    *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
    Ok(tcsetattr(stdin(), OptionalActions::Now, &raw)?)
}

/// Gives the terminal back as it was.
pub fn restore() {
    if let Some(before) = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take() {
        // A terminal that is gone needs nothing.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &before);
    }
}
