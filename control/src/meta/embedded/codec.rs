//! The journal's bytes: header, frames, records. All integers little-endian.
//!
//! Decoding is total: any bytes give a value or a [`Damage`], and nothing is allocated for a length that the bytes at
//! hand do not back.
//!
//! ```text
//! file    = header snapshot-frame* frame*
//! header  = magic[8] version:u16 0:u16 0:u32 store-id[16] salt[16] snapshot-bytes:u64 0:u32 crc32c:u32       64 bytes
//! frame   = magic:u32 payload-bytes:u32 sequence:u64 crc32c(salt, the 16 bytes before, payload):u32 payload
//! payload = record*
//! ```
//!
//! A frame is one durable write: its successor is written only after it reached stable storage. So a bad frame that
//! has a good one of a later sequence behind it is damage; a bad frame with none behind it is the write that a crash
//! cut short, and was acknowledged to nobody. Snapshot frames were all durable before the file got its name: a bad one
//! is always damage. The salt is new in every file, so that no frame of another file, or of a value that holds a copy
//! of one, is ever taken for this file's.

use crate::meta::state::{Record, State};
use crate::meta::{KeyValue, LeaseId, MAX_KEY_BYTES, Op, Revision};

pub(super) const HEADER_BYTES: usize = 64;
pub(super) const FRAME_HEAD_BYTES: usize = 20;
/// Longest payload that is taken for a frame. Batches are closed far below.
pub(super) const MAX_PAYLOAD_BYTES: usize = 16 * 1024 * 1024;
const MAGIC: [u8; 8] = *b"TORUSMJ\n";
const VERSION: u16 = 1;
const FRAME_MAGIC: u32 = 0x4D52_464A;
const SNAPSHOT_FRAME_BYTES: usize = 1024 * 1024;

const WRITE: u8 = 1;
const GRANT: u8 = 2;
const REVOKE: u8 = 3;
const SNAPSHOT_HEAD: u8 = 4;
const SNAPSHOT_LEASE: u8 = 5;
const SNAPSHOT_ENTRY: u8 = 6;

const PUT: u8 = 1;
const DELETE: u8 = 2;

/// What is wrong, and where in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Damage {
    /// Written by a newer version of this program.
    Version(u16),
    At {
        offset: u64,
        what: &'static str,
    },
}

impl Damage {
    fn at(offset: usize, what: &'static str) -> Self {
        Self::At { offset: offset as u64, what }
    }
}

/// The identity of a journal file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    /// Of the store: kept when the journal is rewritten.
    pub(super) store: [u8; 16],
    /// Of this file.
    pub(super) salt: [u8; 16],
}

/// A journal read back.
#[derive(Debug)]
pub(super) struct Parsed {
    pub(super) identity: Identity,
    pub(super) state: State,
    /// Bytes of header and snapshot.
    pub(super) base_bytes: u64,
    /// Where the last frame begins; `end` if there is none behind the snapshot.
    pub(super) last_frame: u64,
    /// Where the next frame goes; bytes beyond are a write that was cut short.
    pub(super) end: u64,
    /// Sequence of the next frame.
    pub(super) sequence: u64,
}

/// Appends a frame to `out`.
///
/// `payload` is at most [`MAX_PAYLOAD_BYTES`].
pub(super) fn put_frame(out: &mut Vec<u8>, salt: &[u8; 16], sequence: u64, payload: &[u8]) {
    let len = u32::try_from(payload.len()).expect("batches are closed below MAX_PAYLOAD_BYTES");
    let start = out.len();
    out.extend_from_slice(&FRAME_MAGIC.to_le_bytes());
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(&sequence.to_le_bytes());
    let crc = frame_crc(salt, &out[start..], payload);
    out.extend_from_slice(&crc.to_le_bytes());
    out.extend_from_slice(payload);
}

fn frame_crc(salt: &[u8; 16], head: &[u8], payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(salt), head), payload)
}

/// A whole new journal file that holds `state`.
pub(super) fn encode_file(identity: &Identity, state: &State) -> (Vec<u8>, u64) {
    let mut frames = Vec::new();
    let mut payload = Vec::new();
    let mut sequence = 1;
    let mut close = |payload: &mut Vec<u8>, force: bool| {
        if payload.len() >= SNAPSHOT_FRAME_BYTES || (force && !payload.is_empty()) {
            put_frame(&mut frames, &identity.salt, sequence, payload);
            sequence += 1;
            payload.clear();
        }
    };
    payload.push(SNAPSHOT_HEAD);
    payload.extend_from_slice(&state.revision().0.to_le_bytes());
    payload.extend_from_slice(&state.last_lease().0.to_le_bytes());
    for (lease, ttl_ms) in state.leases() {
        payload.push(SNAPSHOT_LEASE);
        payload.extend_from_slice(&lease.0.to_le_bytes());
        payload.extend_from_slice(&ttl_ms.to_le_bytes());
        close(&mut payload, false);
    }
    for (key, entry) in state.entries() {
        payload.push(SNAPSHOT_ENTRY);
        payload.extend_from_slice(&entry.mod_revision.0.to_le_bytes());
        put_entry(&mut payload, key, entry.lease, &entry.value);
        close(&mut payload, false);
    }
    close(&mut payload, true);
    let mut file = Vec::with_capacity(HEADER_BYTES + frames.len());
    put_header(&mut file, identity, frames.len() as u64);
    file.extend_from_slice(&frames);
    (file, sequence)
}

fn put_header(out: &mut Vec<u8>, identity: &Identity, snapshot_bytes: u64) {
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&[0; 6]);
    out.extend_from_slice(&identity.store);
    out.extend_from_slice(&identity.salt);
    out.extend_from_slice(&snapshot_bytes.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    let crc = crc32c::crc32c(out);
    out.extend_from_slice(&crc.to_le_bytes());
}

/// Appends a record to a payload.
pub(super) fn put_record(out: &mut Vec<u8>, record: &Record) {
    match record {
        Record::Write { revision, ops } => {
            out.push(WRITE);
            out.extend_from_slice(&revision.0.to_le_bytes());
            put_len(out, ops.len());
            for op in ops {
                put_op(out, op);
            }
        }
        Record::Grant { lease, ttl_ms } => {
            out.push(GRANT);
            out.extend_from_slice(&lease.0.to_le_bytes());
            out.extend_from_slice(&ttl_ms.to_le_bytes());
        }
        Record::Revoke { lease, revision } => {
            out.push(REVOKE);
            out.extend_from_slice(&lease.0.to_le_bytes());
            out.extend_from_slice(&revision.0.to_le_bytes());
        }
    }
}

fn put_op(out: &mut Vec<u8>, op: &Op) {
    match op {
        Op::Put { key, value, lease } => {
            out.push(PUT);
            put_entry(out, key, *lease, value);
        }
        Op::Delete { key } => {
            out.push(DELETE);
            put_bytes(out, key.as_bytes());
        }
    }
}

fn put_entry(out: &mut Vec<u8>, key: &str, lease: Option<LeaseId>, value: &[u8]) {
    put_bytes(out, key.as_bytes());
    out.extend_from_slice(&lease.map_or(0, |lease| lease.0).to_le_bytes());
    put_bytes(out, value);
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_len(out, bytes.len());
    out.extend_from_slice(bytes);
}

fn put_len(out: &mut Vec<u8>, len: usize) {
    let len = u32::try_from(len).expect("a validated transaction is far below 4 GiB");
    out.extend_from_slice(&len.to_le_bytes());
}

/// Reads a journal file. `history_limit_bytes` is the state's.
pub(super) fn parse(file: &[u8], history_limit_bytes: usize) -> Result<Parsed, Damage> {
    let (identity, base_bytes) = parse_header(file)?;
    let mut frames = Frames { file, salt: identity.salt, offset: HEADER_BYTES, sequence: 1 };
    let mut state = parse_snapshot(&mut frames, base_bytes, history_limit_bytes)?;
    let mut last_frame = frames.offset;
    while let Some((offset, payload)) = frames.next()? {
        apply_payload(&mut state, offset, payload)?;
        last_frame = offset;
    }
    Ok(Parsed {
        identity,
        state,
        base_bytes: base_bytes as u64,
        last_frame: last_frame as u64,
        end: frames.offset as u64,
        sequence: frames.sequence,
    })
}

fn parse_header(file: &[u8]) -> Result<(Identity, usize), Damage> {
    let Some(header) = file.first_chunk::<HEADER_BYTES>() else {
        return Err(Damage::at(0, "the file is shorter than its header"));
    };
    let mut reader = Reader { bytes: header };
    if reader.array::<8>() != Some(MAGIC) {
        return Err(Damage::at(0, "not a metadata journal"));
    }
    let version = reader.u16().unwrap_or_default();
    if version != VERSION {
        return Err(Damage::Version(version));
    }
    if crc32c::crc32c(&header[..HEADER_BYTES - 4]).to_le_bytes() != header[HEADER_BYTES - 4..] {
        return Err(Damage::at(0, "the header's checksum does not match"));
    }
    let fields = (|| {
        reader.array::<6>()?;
        let identity = Identity { store: reader.array()?, salt: reader.array()? };
        let base_bytes = usize::try_from(reader.u64()?).ok()?.checked_add(HEADER_BYTES)?;
        Some((identity, base_bytes))
    })();
    let (identity, base_bytes) = fields.ok_or(Damage::at(0, "the header holds an impossible length"))?;
    if base_bytes > file.len() {
        return Err(Damage::at(file.len(), "the file ends within its snapshot"));
    }
    Ok((identity, base_bytes))
}

fn parse_snapshot(frames: &mut Frames<'_>, end: usize, history_limit_bytes: usize) -> Result<State, Damage> {
    let mut snapshot = SnapshotParts::default();
    while frames.offset < end {
        let offset = frames.offset;
        let Some(payload) = frames.frame_at(offset, frames.sequence) else {
            return Err(Damage::at(offset, "a bad frame within the snapshot"));
        };
        frames.advance(payload);
        snapshot.add(payload).ok_or(Damage::at(offset, "a malformed record within the snapshot"))?;
    }
    if frames.offset != end {
        return Err(Damage::at(end, "the snapshot does not end where the header says"));
    }
    let (revision, last_lease) = snapshot.head.ok_or(Damage::at(HEADER_BYTES, "the snapshot has no head"))?;
    State::restore(revision, last_lease, snapshot.leases, snapshot.entries, history_limit_bytes)
        .map_err(|inconsistent| Damage::at(HEADER_BYTES, inconsistent.0))
}

#[derive(Default)]
struct SnapshotParts {
    head: Option<(Revision, LeaseId)>,
    leases: Vec<(LeaseId, u64)>,
    entries: Vec<KeyValue>,
}

impl SnapshotParts {
    fn add(&mut self, payload: &[u8]) -> Option<()> {
        let mut reader = Reader { bytes: payload };
        while !reader.bytes.is_empty() {
            match reader.u8()? {
                SNAPSHOT_HEAD if self.head.is_none() => {
                    self.head = Some((Revision(reader.i64()?), LeaseId(reader.i64()?)));
                }
                SNAPSHOT_LEASE => self.leases.push((LeaseId(reader.i64()?), reader.u64()?)),
                SNAPSHOT_ENTRY => {
                    let mod_revision = Revision(reader.i64()?);
                    let (key, lease, value) = reader.entry()?;
                    self.entries.push(KeyValue { key, value, mod_revision, lease });
                }
                _ => return None,
            }
        }
        Some(())
    }
}

fn apply_payload(state: &mut State, offset: usize, payload: &[u8]) -> Result<(), Damage> {
    let mut reader = Reader { bytes: payload };
    while !reader.bytes.is_empty() {
        let record = reader.record().ok_or(Damage::at(offset, "a malformed record in a good frame"))?;
        state.apply(&record).map_err(|inconsistent| Damage::at(offset, inconsistent.0))?;
    }
    Ok(())
}

/// Walks the frames of a file.
struct Frames<'a> {
    file: &'a [u8],
    salt: [u8; 16],
    offset: usize,
    /// Of the frame expected at `offset`.
    sequence: u64,
}

impl<'a> Frames<'a> {
    /// The next frame's offset and payload; `None` at the end, a torn tail included.
    fn next(&mut self) -> Result<Option<(usize, &'a [u8])>, Damage> {
        let offset = self.offset;
        if let Some(payload) = self.frame_at(offset, self.sequence) {
            self.advance(payload);
            return Ok(Some((offset, payload)));
        }
        if self.later_frame_exists() {
            return Err(Damage::at(offset, "a bad frame, with good ones behind it"));
        }
        Ok(None)
    }

    fn advance(&mut self, payload: &[u8]) {
        self.offset += FRAME_HEAD_BYTES + payload.len();
        self.sequence += 1;
    }

    /// The payload of a whole and correct frame at `offset` whose sequence is at least `sequence_min`.
    fn frame_from(&self, offset: usize, sequence_min: u64) -> Option<(u64, &'a [u8])> {
        let mut reader = Reader { bytes: self.file.get(offset..)? };
        let head = reader.bytes.get(..16)?;
        if reader.u32()? != FRAME_MAGIC {
            return None;
        }
        let len = usize::try_from(reader.u32()?).ok()?;
        let sequence = reader.u64()?;
        let crc = reader.u32()?;
        if len > MAX_PAYLOAD_BYTES || sequence < sequence_min {
            return None;
        }
        let payload = reader.take(len)?;
        (frame_crc(&self.salt, head, payload) == crc).then_some((sequence, payload))
    }

    fn frame_at(&self, offset: usize, sequence: u64) -> Option<&'a [u8]> {
        self.frame_from(offset, sequence).filter(|(found, _)| *found == sequence).map(|(_, payload)| payload)
    }

    /// Whether any offset behind the bad frame holds a good frame of its sequence or a later one.
    fn later_frame_exists(&self) -> bool {
        let magic = FRAME_MAGIC.to_le_bytes();
        let tail = self.file.get(self.offset..).unwrap_or_default();
        tail.windows(magic.len())
            .enumerate()
            .filter(|(_, window)| *window == magic)
            .any(|(at, _)| self.frame_from(self.offset + at, self.sequence).is_some())
    }
}

/// Takes values off the front of a slice; `None` when it ends too early.
struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.bytes.split_at_checked(len)?;
        self.bytes = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn u8(&mut self) -> Option<u8> {
        self.array().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn i64(&mut self) -> Option<i64> {
        self.array().map(i64::from_le_bytes)
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let len = usize::try_from(self.u32()?).ok()?;
        self.take(len)
    }

    fn key(&mut self) -> Option<String> {
        let key = self.bytes()?;
        if key.is_empty() || key.len() > MAX_KEY_BYTES {
            return None;
        }
        std::str::from_utf8(key).ok().map(str::to_owned)
    }

    fn entry(&mut self) -> Option<(String, Option<LeaseId>, Vec<u8>)> {
        let key = self.key()?;
        let lease = Some(LeaseId(self.i64()?)).filter(|lease| lease.0 != 0);
        Some((key, lease, self.bytes()?.to_vec()))
    }

    fn op(&mut self) -> Option<Op> {
        match self.u8()? {
            PUT => {
                let (key, lease, value) = self.entry()?;
                Some(Op::Put { key, value, lease })
            }
            DELETE => Some(Op::Delete { key: self.key()? }),
            _ => None,
        }
    }

    fn record(&mut self) -> Option<Record> {
        match self.u8()? {
            WRITE => {
                let revision = Revision(self.i64()?);
                let ops = (0..self.u32()?).map(|_| self.op()).collect::<Option<Vec<_>>>()?;
                Some(Record::Write { revision, ops })
            }
            GRANT => Some(Record::Grant { lease: LeaseId(self.i64()?), ttl_ms: self.u64()? }),
            REVOKE => Some(Record::Revoke { lease: LeaseId(self.i64()?), revision: Revision(self.i64()?) }),
            _ => None,
        }
    }
}
