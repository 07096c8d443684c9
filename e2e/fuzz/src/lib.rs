//! Throws changed inputs at decoders, on stable Rust and in ordinary tests: `cargo test fuzz` runs each for a second,
//! `make fuzz` for ten minutes.
//!
//! [`fuzz`] begins with the inputs in `e2e/fuzz/corpus/NAME`, changes them, and goes on from what leads to an outcome that
//! it has not seen; what an outcome is, a test says ([`words`] makes one of an error's message). What makes a decoder
//! panic, or takes too long, is written to the corpus, so that the next run begins with it, and the test fails. What ends
//! the process is in `$TMPDIR/tgb-fuzz-NAME`.

use fastrand::Rng;
use std::collections::HashSet;
use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// No input is longer, so that no decoder's time is the input's size.
const LONGEST: usize = 1 << 16;
/// No corpus grows beyond this many inputs.
const MOST: usize = 300;
/// And none on disk beyond these.
const KEPT: usize = 40;
/// One input may not take more of a processor's time, however busy the machine is with other tests.
const SLOW: Duration = Duration::from_secs(2);
/// Memory that one decoder's run may take, bytes.
const MEMORY: u64 = 512 << 20;

/// How long, and with which numbers.
struct Run {
    time: Duration,
    seed: u64,
    /// Whether inputs with new outcomes are added to the corpus.
    keep: bool,
}

impl Run {
    fn from_environment() -> Self {
        let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        let time = number("TGB_FUZZ_SECONDS");
        Self {
            time: Duration::from_secs(time.unwrap_or(1)),
            seed: number("TGB_FUZZ_SEED").unwrap_or_else(|| fastrand::u64(..)),
            keep: time.is_some(),
        }
    }
}

/// What a message says apart from numbers and what it quotes, which differ with every input.
pub fn words(text: &str) -> String {
    let mut quote = None;
    let plain = text.chars().filter(|c| match quote {
        Some(end) => {
            if *c == end {
                quote = None;
            }
            false
        }
        None => {
            if matches!(c, '`' | '"') {
                quote = Some(*c);
            }
            c.is_ascii_alphabetic() || *c == ' '
        }
    });
    plain.take(80).collect()
}

/// Decodes changed inputs until the time is over. `words` are put into inputs.
///
/// # Panics
/// If an input makes `decode` panic, takes longer than [`SLOW`], or the run takes more memory than [`MEMORY`].
pub fn fuzz<O: Hash>(name: &str, seeds: &[&[u8]], words: &[&str], decode: impl FnMut(&[u8]) -> O + Send) {
    // As a program's main thread has it; threads of tests have a quarter.
    let thread = std::thread::Builder::new().stack_size(8 << 20);
    let done = std::thread::scope(|scope| {
        let running = thread.spawn_scoped(scope, || run(name, seeds, words, decode));
        running.map_err(|error| error.to_string())?.join().map_err(|panic| match panic.downcast::<String>() {
            Ok(message) => *message,
            Err(_) => "it panics".to_owned(),
        })
    });
    if let Err(message) = done {
        fail(&message);
    }
}

fn run<O: Hash>(name: &str, seeds: &[&[u8]], words: &[&str], mut decode: impl FnMut(&[u8]) -> O) {
    let run = Run::from_environment();
    let dir = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus")).join(name);
    let mut corpus: Vec<Vec<u8>> = seeds.iter().map(|seed| seed.to_vec()).collect();
    let mut files: Vec<PathBuf> =
        fs::read_dir(&dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    files.sort();
    corpus.extend(files.iter().filter_map(|path| fs::read(path).ok()));
    let mut random = Rng::with_seed(run.seed);
    let mut seen = HashSet::new();
    let memory = highest_memory();
    let begun = Instant::now();
    let (mut count, mut kept) = (0_u64, 0);
    let mut waiting: Vec<Vec<u8>> = corpus.clone();
    while !waiting.is_empty() || begun.elapsed() < run.time {
        let input = waiting.pop().unwrap_or_else(|| change(&corpus, words, &mut random));
        if run.keep {
            // An overflow of the stack ends the process at once.
            let _ = fs::write(std::env::temp_dir().join(format!("tgb-fuzz-{name}")), &input);
        }
        let (started, spent) = (Instant::now(), processor_time());
        let result = catch_unwind(AssertUnwindSafe(|| decode(&input)));
        count += 1;
        let wrong = match result {
            Err(_) => Some("panics"),
            Ok(_) if started.elapsed() > SLOW && processor_time().saturating_sub(spent) > SLOW => {
                Some("takes too long")
            }
            Ok(outcome) => {
                let mut hasher = DefaultHasher::new();
                outcome.hash(&mut hasher);
                let is_new = seen.insert(hasher.finish());
                if is_new && waiting.is_empty() && corpus.len() < MOST {
                    if run.keep && files.len() + kept < KEPT {
                        write(&dir, "seen", &input);
                        kept += 1;
                    }
                    corpus.push(input.clone());
                }
                None
            }
        };
        if let Some(wrong) = wrong {
            let path = write(&dir, "wrong", &input);
            fail(&format!("{name} {wrong} with {}; TGB_FUZZ_SEED={}", path.display(), run.seed));
        }
    }
    let took = highest_memory().saturating_sub(memory);
    println!(
        "{name}: {count} inputs, {} outcomes, {} inputs in the corpus, {} MB, TGB_FUZZ_SEED={}",
        seen.len(),
        corpus.len(),
        took >> 20,
        run.seed
    );
    if took > MEMORY {
        fail(&format!("{name} took {} MB; TGB_FUZZ_SEED={}", took >> 20, run.seed));
    }
}

#[expect(clippy::panic, reason = "this fails a test")]
fn fail(message: &str) -> ! {
    panic!("{message}")
}

/// What this thread has had of a processor.
fn processor_time() -> Duration {
    let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanoseconds = text.split(' ').next().and_then(|first| first.parse().ok());
    Duration::from_nanos(nanoseconds.unwrap_or(0))
}

/// `VmHWM`, bytes.
fn highest_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}

fn write(dir: &PathBuf, kind: &str, input: &[u8]) -> PathBuf {
    let mut hasher = DefaultHasher::new();
    input.hash(&mut hasher);
    let path = dir.join(format!("{kind}-{:016x}", hasher.finish()));
    // Without a place to write to, the message still says what was found.
    let _ = fs::create_dir_all(dir);
    let _ = fs::write(&path, input);
    path
}

/// One input of the corpus, changed in one to six places.
fn change(corpus: &[Vec<u8>], words: &[&str], random: &mut Rng) -> Vec<u8> {
    let pick =
        |random: &mut Rng| corpus.get(random.usize(..corpus.len().max(1))).cloned().unwrap_or_default();
    let mut input = pick(random);
    for _ in 0..random.usize(1..=6) {
        let at = random.usize(..=input.len());
        let end = random.usize(at..=input.len().min(at + 64));
        match random.u32(..11) {
            0 => {
                if let Some(byte) = input.get_mut(at) {
                    *byte ^= 1 << random.u32(..8);
                }
            }
            1 => {
                if let Some(byte) = input.get_mut(at) {
                    *byte = random.u8(..);
                }
            }
            2 => drop(input.drain(at..end)),
            3 => insert(&mut input, at, &[random.u8(..)]),
            4 | 5 if !words.is_empty() => {
                let word = words.get(random.usize(..words.len())).copied().unwrap_or_default();
                insert(&mut input, at, word.as_bytes());
            }
            6 => {
                let copy = input.get(at..end).unwrap_or_default().to_vec();
                let to = random.usize(..=input.len());
                insert(&mut input, to, &copy);
            }
            7 => {
                let other = pick(random);
                let from = random.usize(..=other.len());
                let until = random.usize(from..=other.len());
                insert(&mut input, at, other.get(from..until).unwrap_or_default());
            }
            8 => {
                const NUMBERS: [&str; 9] =
                    ["0", "-1", "65535", "65536", "2147483648", "9223372036854775808", "1e999", "00", "0.5"];
                let number = NUMBERS.get(random.usize(..NUMBERS.len())).copied().unwrap_or_default();
                replace_number(&mut input, at, number);
            }
            9 => {
                // nesting and length, the enemies of stacks and of memory
                let what = *random
                    .choice([&b"["[..], b"{\"a\":", b"- ", b"<a>", b"(", b"*a ", b"\"\\u0000"].iter())
                    .unwrap_or(&&b"["[..]);
                let many = what.repeat(random.usize(1..400));
                insert(&mut input, at, &many);
            }
            _ => input.truncate(at),
        }
    }
    input.truncate(LONGEST);
    input
}

fn insert(input: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    input.splice(at..at, bytes.iter().copied());
}

/// The digits behind `at` become another number.
fn replace_number(input: &mut Vec<u8>, at: usize, number: &str) {
    let Some(start) = input.iter().skip(at).position(u8::is_ascii_digit).map(|offset| at + offset) else {
        return;
    };
    let length = input.iter().skip(start).take_while(|byte| byte.is_ascii_digit()).count();
    input.splice(start..start + length, number.bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decoder_that_panics_is_found_and_what_it_was_given_is_kept() {
        let dir = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/of-the-fuzzer"));
        let found = catch_unwind(|| {
            fuzz("of-the-fuzzer", &[b"port=80"], &["!"], |input| {
                assert!(!input.windows(2).any(|pair| pair == b"!8"), "found");
                input.len() / 8
            });
        });
        let kept = fs::read_dir(&dir).into_iter().flatten().flatten().count();
        let _ = fs::remove_dir_all(&dir);
        assert!(found.is_err() && kept > 0);
    }

    #[test]
    fn words_leave_out_numbers_and_what_is_quoted() {
        assert_eq!(words("port 80 of `web` is wrong"), words("port 8080 of `shop` is wrong"));
        assert_ne!(words("port 80 is wrong"), words("name 80 is wrong"));
    }
}
