//! `noded`: first process of the node image, or a service. Starts one or the other; see the library for the rest.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use noded::service::{Arguments, USAGE};
use noded::{init, service};

fn main() -> ExitCode {
    if std::process::id() == 1 {
        init::run();
    }
    let args: Vec<_> = std::env::args().skip(1).collect();
    if args.iter().any(|arg| arg == "--help" || arg == "-h") {
        print!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    let arguments = match Arguments::parse(args.into_iter()) {
        Ok(arguments) => arguments,
        Err(error) => {
            eprint!("noded: {error}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match service::run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(trouble) => {
            eprintln!("noded: {trouble}");
            ExitCode::FAILURE
        }
    }
}
