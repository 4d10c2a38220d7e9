//! Files of machines: what comes back is what went in, and nothing else is taken for one.

use super::*;
use onde_wire::key::Key;
use onde_wire::machine::Space;
use std::net::TcpListener;
use std::sync::atomic::{AtomicU32, Ordering};

const START: Start =
    Start { job: [3; 16], space: Space { mem_bytes: 64 << 20, disk_bytes: 0 }, vcpus: 2 };

/// A stream with one record of each kind.
fn stream() -> Vec<u8> {
    let mut noise = 7u32;
    let mut random = || {
        noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (noise >> 24) as u8
    };
    let mut stream = StreamWriter::start(Vec::new(), &START).unwrap();
    stream.memory(0x1000, &[5; 8192]).unwrap();
    stream.memory(0x10_0000, &[0; 4096]).unwrap();
    let noise: Vec<u8> = (0..4096).map(|_| random()).collect();
    stream.memory(0x20_0000, &noise).unwrap();
    stream.machine(b"a state").unwrap().0
}

/// A folder of its own for a test, gone with it.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("onde-snapshot-{}-{number}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        fs::create_dir(&folder).unwrap();
        Self(folder)
    }

    fn file(&self, bytes: &[u8]) -> PathBuf {
        let file = self.0.join("machine");
        fs::write(&file, bytes).unwrap();
        file
    }

    fn names(&self) -> Vec<String> {
        let names = fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().file_name());
        names.map(|name| name.into_string().unwrap()).collect()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn flaw(bytes: &[u8]) -> Option<Flaw> {
    let folder = Folder::new();
    match SnapshotFile::open(&folder.file(bytes)) {
        Ok(_) => None,
        Err(FileError::Flawed { flaw, .. }) => Some(flaw),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_file_becomes_another_machine_with_the_same_memory() {
    let folder = Folder::new();
    let opened = SnapshotFile::open(&folder.file(&stream())).unwrap();
    assert_eq!((opened.start(), opened.mem_total()), (START, 4 * 4096));
    let (child, mut out) = (Start { job: [4; 16], ..START }, Vec::new());
    let done = opened.write(&mut out, &child, |_| {}).unwrap();
    assert_eq!((done.mem_done, done.sent), (4 * 4096, out.len() as u64));
    let records = |bytes: &[u8], start| {
        let mut records = Vec::new();
        let mut scanner = Scanner::new(start);
        for piece in bytes.chunks(1000) {
            let mut keep = |head: &Head, payload: &[u8]| {
                records.push((*head, payload.to_vec()));
                Ok(())
            };
            assert!(scanner.push(piece, &mut keep).is_ok());
        }
        assert!(scanner.checker.is_done());
        records
    };
    let (from, to) = (records(&stream(), START), records(&out, child));
    assert_eq!(from.len(), 6);
    assert_eq!(from[1..5], to[1..5]);
    assert_eq!(from[4].1, b"a state");
}

#[test]
fn a_file_that_is_cut_or_altered_anywhere_is_refused() {
    let whole = stream();
    for size in (0..whole.len()).step_by(61) {
        let expect = if size < HEAD_SIZE + START_SIZE { Flaw::Other } else { Flaw::Cut };
        assert_eq!(flaw(&whole[..size]), Some(expect), "cut at {size}");
    }
    for at in (0..whole.len()).step_by(37).chain(HEAD_SIZE..HEAD_SIZE + START_SIZE) {
        let mut altered = whole.clone();
        altered[at] ^= 1 << (at % 8);
        assert!(flaw(&altered).is_some(), "altered at {at}");
    }
    assert_eq!(flaw(&[&whole[..], b"x"].concat()), Some(Flaw::Altered));
    assert_eq!(flaw(&[7; 1000]), Some(Flaw::Other));
    let mut version = whole.clone();
    version[HEAD_SIZE + 8] += 1;
    assert_eq!(flaw(&version), Some(Flaw::Version));
    assert_eq!(flaw(&whole), None);
}

/// Takes a snapshot from an agent that sends `frames`; what the folder holds then.
fn take_from(frames: &[AgentFrame<'_>]) -> (Result<Snapshot, TakeError>, Vec<String>) {
    let (folder, key) = (Folder::new(), Key::new(&[2; 32]));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let result = std::thread::scope(|scope| {
        scope.spawn(|| {
            let channel = Channel::accept(listener.accept().unwrap().0, &START.job, &key).unwrap();
            let mut reader = FrameReader::new(channel.reader);
            assert_eq!(reader.client().unwrap(), ClientFrame::Snapshot);
            let mut writer = FrameWriter::new(channel.writer);
            // A client that refuses what it hears closes early.
            let _ = frames.iter().try_for_each(|frame| writer.agent(frame));
            let _ = writer.flush();
        });
        let channel = Channel::connect(address, &START.job, &key, Duration::from_secs(5)).unwrap();
        take(channel, START, &folder.0.join("machine"), |_| {})
    });
    (result, folder.names())
}

#[test]
fn only_a_whole_machine_becomes_a_file() {
    let whole = stream();
    let done = AgentFrame::Taken(Taken { pause_us: 9, frozen_pages: 1 });
    let pieces: Vec<_> = whole.chunks(777).map(AgentFrame::Stream).collect();
    let (taken, names) = take_from(&[&pieces[..], &[done]].concat());
    assert_eq!((taken.unwrap().size, names), (whole.len() as u64, vec!["machine".to_owned()]));
    let (cut, names) = take_from(&pieces[..3]);
    assert!(matches!(cut, Err(TakeError::Broken(_))) && names.is_empty());
    let (early, names) = take_from(&[pieces[0], done]);
    assert!(matches!(early, Err(TakeError::Broken(_))) && names.is_empty());
    let refusal = onde_wire::session::Refusal::Guest;
    let (refused, names) = take_from(&[pieces[0], AgentFrame::Error { refusal, text: "no" }]);
    assert!(matches!(refused, Err(TakeError::Refused(text)) if text == "no") && names.is_empty());
    let (altered, names) = take_from(&[AgentFrame::Stream(&whole[1..2000])]);
    assert!(matches!(altered, Err(TakeError::Stream(_))) && names.is_empty());
}
