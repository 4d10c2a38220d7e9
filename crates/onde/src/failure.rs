//! How failures reach people: one line for the whole chain, then `hint:` lines. Used by `main` and by whatever
//! reports a failure and goes on.

use onde_client::bootstrap::BootstrapError;
use onde_client::broker::BrokerError;
use onde_client::echo::EchoError;
use onde_client::job::JobsError;
use onde_client::layout::LayoutError;
use onde_client::node::NodeError;
use onde_client::snapshot::FileError;
use std::fmt;
use std::io::ErrorKind;

/// A failure with what to do about it.
#[derive(Debug)]
pub struct Hinted {
    text: String,
    hint: &'static str,
}

impl fmt::Display for Hinted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Hinted {}

/// A failure with what to do about it.
pub fn hinted(text: impl Into<String>, hint: &'static str) -> anyhow::Error {
    Hinted { text: text.into(), hint }.into()
}

/// The lines for a failure.
pub fn lines(error: &anyhow::Error) -> String {
    let text = format!("{error:#}");
    // The lab's library puts its hints into the text.
    let (told, text): (Vec<&str>, Vec<&str>) =
        text.lines().partition(|line| line.starts_with("hint: "));
    let mut out = format!("error: {}", text.join("\n"));
    let known = error.chain().find_map(hint).map(|hint| format!("hint: {hint}"));
    for hint in told.into_iter().map(str::to_owned).chain(known) {
        out.push('\n');
        out.push_str(&hint);
    }
    out
}

fn hint<'a>(cause: &'a (dyn std::error::Error + 'static)) -> Option<&'a str> {
    if let Some(hinted) = cause.downcast_ref::<Hinted>() {
        return Some(hinted.hint);
    }
    if let Some(error) = cause.downcast_ref::<BrokerError>() {
        // The broker's own hints speak of its API; these of this program.
        return match error.word() {
            Some("unauthorized") => Some("onde account use KEY --broker URL takes the right key"),
            Some("no_fitting_node") => Some("onde node ls shows what is free"),
            Some("not_operator") => Some("--operator-key FILE, as the broker wrote it"),
            Some("account_exists") => Some("take another name"),
            _ => error.hint(),
        };
    }
    if let Some(LayoutError::Memory { .. }) = cause.downcast_ref::<LayoutError>() {
        return Some("--memory MiB gives it more");
    }
    if let Some(error) = cause.downcast_ref::<NodeError>() {
        return error.hint();
    }
    cause
        .downcast_ref::<EchoError>()
        .and_then(EchoError::hint)
        .or_else(|| cause.downcast_ref::<BootstrapError>().and_then(BootstrapError::hint))
        .or_else(|| cause.downcast_ref::<JobsError>().and_then(JobsError::hint))
        .or_else(|| cause.downcast_ref::<FileError>().and_then(FileError::hint))
}

/// Whether the reader of our output went away, as `head` does: no failure to speak of.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::{Context, anyhow};

    fn check(error: anyhow::Error, expect: &str) {
        assert_eq!(lines(&error), expect);
    }

    #[test]
    fn one_line_for_the_chain_and_hints_below() {
        let silent = EchoError::Silent { node: [198, 18, 1, 1].into() };
        check(
            Err::<(), _>(NodeError::from(silent)).context("cannot boot").unwrap_err(),
            "error: cannot boot: node 198.18.1.1 does not answer\n\
             hint: the node may be off or lost; its jobs are credited by the broker",
        );
        check(anyhow!("no lab\nhint: onde lab up"), "error: no lab\nhint: onde lab up");
        check(hinted("a", "b").context("c"), "error: c: a\nhint: b");
    }
}
