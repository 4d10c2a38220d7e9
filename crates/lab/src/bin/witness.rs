//! A program for guests that are copied and moved: it knows at any time what its memory, its output and its connection have
//! to be, and ends with an error as soon as one is not. `witness HOST:PORT`; ends when the host has said all it has to.
//! Never part of what is shipped.
//!
//! Several threads write pages, each in order, round and round. Before a page is written, it has to hold what was written
//! a round ago; that is, no page is older or newer than the registers of the thread that wrote it.
#![forbid(unsafe_code)]

use onde_lab::witness::{FROM_GUEST, FROM_HOST, GOOD, Noise, PAUSE_MS, PIECE, mix};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

/// Threads that write pages.
const WRITERS: u64 = 3;
/// Pages of each.
const PAGES: u64 = 128;
/// Pages that a thread writes at once, and the time in between: on an emulated node, each time that a processor wakes up costs
/// more than many pages.
const BURST: u64 = 32;
const REST: Duration = Duration::from_millis(50);
/// Between two lines of output.
const LINE_PERIOD: Duration = Duration::from_millis(100);

#[derive(Clone)]
#[repr(align(4096))]
struct Page([u64; 512]);

fn main() -> ExitCode {
    let Some(host) = std::env::args().nth(1) else {
        eprintln!("witness: HOST:PORT is missing");
        return ExitCode::from(2);
    };
    match testify(&host) {
        Ok(()) => ExitCode::from(GOOD),
        Err(error) => fail(&error.to_string()),
    }
}

/// Ends all threads at once: what comes later would only hide it.
fn fail(what: &str) -> ! {
    eprintln!("witness: {what}");
    std::process::exit(3)
}

fn testify(host: &str) -> io::Result<()> {
    let stream = TcpStream::connect(host)?;
    let (over, written) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let writers = [0; WRITERS as usize];
        let writers = (1..).zip(writers).map(|(writer, _)| {
            let (over, written) = (&over, &written);
            scope.spawn(move || write_pages(writer, over, written))
        });
        let writers: Vec<_> = writers.collect();
        scope.spawn(|| write_lines(&over));
        let sender = scope.spawn(|| send(&stream, &over));
        let heard = hear(&stream);
        over.store(true, Ordering::Relaxed);
        heard?;
        let counts = writers.into_iter().map(|writer| writer.join().unwrap_or(0));
        if counts.sum::<u64>() != written.load(Ordering::Relaxed) {
            fail("the threads do not agree on how many pages they wrote");
        }
        sender.join().unwrap_or_else(|_| fail("the sender is gone"))
    })
}

/// Takes all that the host sends.
fn hear(mut stream: &TcpStream) -> io::Result<()> {
    let (mut noise, mut bytes) = (Noise::new(FROM_HOST), [0; PIECE]);
    loop {
        match stream.read(&mut bytes)? {
            0 => return Ok(()),
            size if noise.is_next(&bytes[..size]) => {}
            _ => fail("the host's bytes are not what it sent"),
        }
    }
}

/// Sends until the host has ended, and at last how much that was.
fn send(mut stream: &TcpStream, over: &AtomicBool) -> io::Result<()> {
    let (mut noise, mut bytes, mut sent) = (Noise::new(FROM_GUEST), [0; PIECE], 0u64);
    while !over.load(Ordering::Relaxed) {
        noise.fill(&mut bytes);
        stream.write_all(&bytes)?;
        sent += bytes.len() as u64;
        thread::sleep(Duration::from_millis(PAUSE_MS));
    }
    stream.write_all(&sent.to_le_bytes())?;
    stream.shutdown(Shutdown::Write)
}

fn write_lines(over: &AtomicBool) {
    for line in 1u64.. {
        if over.load(Ordering::Relaxed) {
            return;
        }
        println!("{line}");
        thread::sleep(LINE_PERIOD);
    }
}

/// Writes pages until the host has ended; how many.
fn write_pages(writer: u64, over: &AtomicBool, written: &AtomicU64) -> u64 {
    let mut pages = vec![Page([0; 512]); PAGES as usize];
    (0..PAGES).for_each(|page| fill(&mut pages[page as usize], writer, page, 0));
    let mut count = 0;
    while !over.load(Ordering::Relaxed) {
        for _ in 0..BURST {
            let (page, round) = (count % PAGES, count / PAGES);
            check(&pages[page as usize], writer, page, round);
            fill(&mut pages[page as usize], writer, page, round + 1);
            written.fetch_add(1, Ordering::Relaxed);
            count += 1;
        }
        thread::sleep(REST);
    }
    for page in 0..PAGES {
        let is_new = page < count % PAGES;
        check(&pages[page as usize], writer, page, count / PAGES + u64::from(is_new));
    }
    count
}

/// A page's words, of which the first tells the round.
fn words(writer: u64, page: u64, round: u64) -> impl Iterator<Item = u64> {
    let seed = mix(writer << 48 ^ page << 32 ^ round);
    std::iter::once(round).chain((1..512).map(move |word| mix(seed ^ word)))
}

fn fill(to: &mut Page, writer: u64, page: u64, round: u64) {
    to.0.iter_mut().zip(words(writer, page, round)).for_each(|(to, word)| *to = word);
}

fn check(at: &Page, writer: u64, page: u64, round: u64) {
    if !at.0.iter().copied().eq(words(writer, page, round)) {
        let found = at.0[0];
        fail(&format!("page {page} of thread {writer} is of round {found}, not {round}, or torn"));
    }
}
