//! Gives each program its link script's addresses; nothing else is generated.

fn main() {
    let root = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=link.ld");
    for flag in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--gc-sections",
        "-Wl,--build-id=none",
        "-Wl,-z,noexecstack",
        "-Wl,-z,norelro",
        "-Wl,-z,max-page-size=4096",
        "-Wl,--no-eh-frame-hdr",
        &format!("-Wl,-T,{root}/link.ld"),
    ] {
        println!("cargo:rustc-link-arg-bins={flag}");
    }
    // Where each lies and ends: `onde_wire::machine`, less mstrap's stack or the loader's buffers.
    for (program, start, end) in
        [("mstrap", "0xC0100000", "0xC03C0000"), ("loader", "0xC0400000", "0xC0500000")]
    {
        println!("cargo:rustc-link-arg-bin={program}=-Wl,--defsym=IMAGE_START={start}");
        println!("cargo:rustc-link-arg-bin={program}=-Wl,--defsym=IMAGE_END={end}");
    }
}
