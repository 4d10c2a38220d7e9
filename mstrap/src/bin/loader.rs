//! Second stage, the default one: reads a checkpoint stream from mstrap's channel, puts it into RAM and
//! asks the VMM to become that machine. A customer may bring another: see README.md.
#![no_std]
#![no_main]

use core::fmt::{self, Write};
use core::panic::PanicInfo;
use onde_mstrap::metal::ram::Ram;
use onde_mstrap::metal::{Lent, control, info_page};
use onde_mstrap::restore::{Failed, Restore, Restored, Source, Touched};
use onde_wire::bootstrap::{Report, SERVICES_VERSION, Services};
use onde_wire::machine::control::RESULT_OK;
use onde_wire::machine::{Identity, PAGE_SIZE};
use onde_wire::stream::{CHUNK_MAX, Start};

static CHUNK: Lent<[u8; CHUNK_MAX as usize]> = Lent::new([0; CHUNK_MAX as usize]);
static BOUNCE: Lent<[u8; CHUNK_MAX as usize]> = Lent::new([0; CHUNK_MAX as usize]);
static TOUCHED: Lent<Touched> = Lent::new(Touched::new());

unsafe extern "C" {
    /// End of the image and its .bss (link.ld).
    static image_end: u8;
}

/// First byte of the image. Returns only if nothing came of it.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".text.start")]
extern "C" fn start(services: &Services) -> i32 {
    if services.version != SERVICES_VERSION {
        return 1;
    }
    match load(services) {
        Ok(()) => 0,
        Err(Failed::Connection) => 2,
        Err(Failed::Stream(error)) => {
            report(services, Report::BadStream(error as u32));
            3
        }
    }
}

fn load(services: &Services) -> Result<(), Failed> {
    let identity = Identity::parse(info_page()).ok_or(Failed::Connection)?;
    let state = state_area(services);
    // SAFETY: this program, its stack and its data lie in BOOT.
    let mut ram = unsafe { Ram::new(BOUNCE.take()) };
    let Restored { state_size, is_awaited } = Restore {
        source: &mut Channel(services),
        memory: &mut ram,
        touched: TOUCHED.take(),
        chunk: CHUNK.take(),
        state: &mut *state,
    }
    .run(Start { job: identity.job, space: identity.space, vcpus: identity.vcpus })?;

    let state = &state[..state_size];
    let mut result = if is_awaited { control::check(state) } else { RESULT_OK };
    if result == RESULT_OK {
        if is_awaited && !report(services, Report::StreamOk) {
            return Err(Failed::Connection);
        }
        result = control::resume(state);
    }
    say(services, format_args!("loader: machine state refused: {result}\n"));
    report(services, Report::BadState(result));
    Err(Failed::Connection)
}

/// The rest of BOOT behind our .bss, for the machine state.
fn state_area(services: &Services) -> &'static mut [u8] {
    let end = core::ptr::addr_of!(image_end) as u64;
    let start = end.max(services.heap_start).next_multiple_of(PAGE_SIZE);
    let size = services.heap_end.saturating_sub(start) as usize;
    // SAFETY: mstrap gives us this memory, zeroed; our own data ends before it.
    unsafe { core::slice::from_raw_parts_mut(start as *mut u8, size) }
}

/// The channel as a source of bytes.
struct Channel<'a>(&'a Services);

impl Source for Channel<'_> {
    fn recv(&mut self, buffer: &mut [u8]) -> Result<(), Failed> {
        let status = (self.0.recv)(buffer.as_mut_ptr(), buffer.len());
        if status == 0 { Ok(()) } else { Err(Failed::Connection) }
    }
}

/// Tells the client; false if it is gone.
fn report(services: &Services, report: Report) -> bool {
    let bytes = report.emit();
    (services.send)(bytes.as_ptr(), bytes.len()) == 0
}

struct Console<'a>(&'a Services);

impl Write for Console<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        (self.0.log)(text.as_ptr(), text.len());
        Ok(())
    }
}

fn say(services: &Services, text: fmt::Arguments<'_>) {
    let _ = Console(services).write_fmt(text);
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    onde_mstrap::log!("loader: {info}");
    control::power_off()
}
