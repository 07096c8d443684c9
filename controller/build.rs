//! Links the program smaller.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // Addresses that the start fills in take a bit each instead of 24 bytes: a megabyte of the file, which is also a
    // megabyte of memory, since all of it is read then. Any libc of the last years knows it (glibc 2.36, musl 1.2.4).
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux") {
        println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
}
