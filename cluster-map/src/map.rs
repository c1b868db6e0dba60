//! The handles: one for each process, with exactly what that process may write, and a reader that both can share.
//!
//! The types keep the one-writer rule: [`ControlMap`] alone publishes the desired state, [`DataMap`] alone the observed
//! one, both need `&mut` for it, and a lock on the file keeps a second handle of a role out, in this process or any
//! other, until the first is gone. A core's statistics are written through the one [`CoreStats`] of that core.

use crate::clients::{ClientCounter, ClientSnapshot, RecordWords, address_number, mac_number};
use crate::desired::Desired;
use crate::error::{Fault, MapError, Role};
use crate::layout::{self, AreaLayout, CoreLayout, Geometry, Layout, PAGE, Signal};
use crate::observed::Observed;
use crate::shared::{Mapping, futex_wait, futex_wake};
use crate::slot::{self, Area, LAST_VERSION, ReadError, bytes_of, slot_of, wait_past};
use crate::stats::{self, CoreSnapshot, Counter, HistogramWords, Latency, bucket_of};
use crate::sync::{AtomicU32, AtomicU64, Ordering, load_le, store_le};
use crate::{ClusterId, NodeId};
use std::cell::Cell;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::marker::PhantomData;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// How often a reader that the writer overtakes tries again before it says [`MapError::Busy`].
const ATTEMPTS: usize = 256;

/// The two areas, each with the word that its writer wakes readers on.
#[derive(Clone, Copy)]
enum Which {
    Desired,
    Observed,
}

struct Shared {
    mapping: Mapping,
    layout: Layout,
    path: PathBuf,
    /// The newest version read or written, per area: an older one is an error.
    newest: [AtomicU64; 2],
    /// How many bytes of each slot are known to have pages, per area.
    reserved: [[AtomicU64; 2]; 2],
    /// Which cores' statistics have a writer.
    taken: Box<[AtomicBool]>,
    /// Which cores' records of clients have a writer.
    clients_taken: Box<[AtomicBool]>,
}

/// The identifier of this boot of the machine (`/proc/sys/kernel/random/boot_id`), zero where it cannot be had.
fn boot_id() -> [u8; 16] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().parse::<NodeId>().unwrap_or_default().0
}

impl Shared {
    fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> MapError {
        let path = path.to_owned();
        move |source| MapError::Io { action, path, source }
    }

    fn open(path: &Path) -> Result<File, MapError> {
        // Neither a link, which might lead elsewhere, nor a pipe, which might block.
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path)
            .map_err(Self::io(path, "open"))
    }

    /// Checks a file and maps it.
    fn attach(path: &Path, file: File) -> Result<Self, MapError> {
        let metadata = file.metadata().map_err(Self::io(path, "read"))?;
        if !metadata.is_file() || metadata.len() < PAGE as u64 {
            return Err(Fault::NotAMap.at(path));
        }
        let mut page = [0; PAGE];
        file.read_exact_at(&mut page, 0).map_err(Self::io(path, "read"))?;
        let layout = Layout::parse(&page, metadata.len()).map_err(|fault| fault.at(path))?;
        let boot = boot_id();
        if layout.boot != boot && boot != [0; 16] {
            return Err(MapError::EarlierBoot { path: path.to_owned() });
        }
        let mapping = Mapping::new(file, layout.file_len).map_err(Self::io(path, "map"))?;
        let nobody = || (0..layout.stats.cores).map(|_| AtomicBool::new(false)).collect();
        let (taken, clients_taken) = (nobody(), nobody());
        let path = path.to_owned();
        let (newest, reserved) = Default::default();
        let shared = Self { mapping, layout, path, newest, reserved, taken, clients_taken };
        for bytes in shared.layout.fixed() {
            let len = bytes.len();
            shared.mapping.reserve(bytes).map_err(|error| shared.no_room(error, len))?;
        }
        shared.check_versions()?;
        Ok(shared)
    }

    /// A version that no slot can hold is refused at once; a writer goes on counting from it.
    fn check_versions(&self) -> Result<(), MapError> {
        for which in [Which::Desired, Which::Observed] {
            if self.latest(which) > LAST_VERSION {
                return Err(self.fault(Fault::corrupt("version out of range")));
            }
        }
        Ok(())
    }

    fn fault(&self, fault: Fault) -> MapError {
        fault.at(&self.path)
    }

    fn no_room(&self, source: io::Error, bytes: usize) -> MapError {
        let path = self.path.clone();
        match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                MapError::NoSpace { path, bytes: bytes as u64 }
            }
            _ => MapError::Io { action: "reserve memory for", path, source },
        }
    }

    fn take(&self, role: Role) -> Result<(), MapError> {
        match self.mapping.take(role) {
            Ok(true) => Ok(()),
            Ok(false) => Err(MapError::InUse { path: self.path.clone(), role }),
            Err(source) => Err(Self::io(&self.path, "lock")(source)),
        }
    }

    fn places(&self, which: Which) -> &AreaLayout {
        match which {
            Which::Desired => &self.layout.desired,
            Which::Observed => &self.layout.observed,
        }
    }

    fn area(&self, which: Which) -> Area<'_> {
        let (words, places) = (self.mapping.words(), self.places(which));
        let slots = places.slots.clone().map(|slot| &words[slot]);
        Area::new(&words[places.head.clone()], slots).expect("the layout gives an area a page for its head")
    }

    /// The newest version of an area: one load.
    fn latest(&self, which: Which) -> u64 {
        load_le(&self.mapping.words()[self.places(which).head.start], Ordering::Acquire)
    }

    fn wake_word(&self, which: Which) -> &AtomicU32 {
        let signal = match which {
            Which::Desired => Signal::DesiredWake,
            Which::Observed => Signal::ObservedWake,
        };
        self.mapping.futex(self.layout.signal(signal)).expect("the layout puts signals inside the file")
    }

    fn wake(&self, which: Which) {
        let word = self.wake_word(which);
        slot::bump(word);
        futex_wake(word);
    }

    fn signal(&self, signal: Signal) -> &AtomicU64 {
        &self.mapping.words()[self.layout.signal(signal)]
    }

    /// Makes sure that the first `len` bytes of a slot can be touched.
    fn reserve_slot(&self, which: Which, slot: usize, len: usize) -> io::Result<()> {
        let reserved = &self.reserved[which as usize][slot];
        let wanted = len.next_multiple_of(PAGE);
        if reserved.load(Ordering::Relaxed) >= wanted as u64 {
            return Ok(());
        }
        let start = self.places(which).slots[slot].start * size_of::<u64>();
        self.mapping.reserve(start..start + wanted)?;
        reserved.fetch_max(wanted as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Publishes an encoded state; only for the writer of the area.
    fn publish(&self, which: Which, bytes: &[u8]) -> Result<u64, MapError> {
        let capacity = self.places(which).slots[0].len() * size_of::<u64>();
        if bytes.len() > capacity {
            return Err(MapError::TooBig { bytes: bytes.len() as u64, capacity: capacity as u64 });
        }
        let area = self.area(which);
        let latest = self.newest(which)?;
        if latest >= LAST_VERSION {
            return Err(self.fault(Fault::corrupt("version out of range")));
        }
        let idle = slot_of(latest + 1);
        self.reserve_slot(which, idle, bytes.len()).map_err(|error| self.no_room(error, bytes.len()))?;
        let filling = area.begin();
        let version = filling.version();
        filling.fill(bytes);
        filling.publish();
        self.newest[which as usize].fetch_max(version, Ordering::Relaxed);
        self.wake(which);
        Ok(version)
    }

    /// The newest version, which never goes back.
    fn newest(&self, which: Which) -> Result<u64, MapError> {
        // The bound is loaded first: a version that another thread has seen meanwhile is then no error.
        let seen = self.newest[which as usize].load(Ordering::Acquire);
        let found = self.latest(which);
        self.note(which, seen, found)
    }

    fn note(&self, which: Which, seen: u64, found: u64) -> Result<u64, MapError> {
        if found < seen {
            return Err(MapError::Backward { path: self.path.clone(), seen, found });
        }
        self.newest[which as usize].fetch_max(found, Ordering::AcqRel);
        Ok(found)
    }

    /// Reads the newest state of an area; `T::default()` if none was published.
    fn read<T: Default>(
        &self,
        which: Which,
        decode: impl FnOnce(&[u8], u64) -> Result<T, Fault>,
    ) -> Result<T, MapError> {
        let seen = self.newest[which as usize].load(Ordering::Acquire);
        let mut words = Vec::new();
        let prepare = |slot, len| self.reserve_slot(which, slot, len);
        let found = match self.area(which).read(&mut words, ATTEMPTS, prepare) {
            Ok(found) => found,
            Err(ReadError::Busy) => return Err(MapError::Busy),
            Err(ReadError::Damaged(what)) => return Err(self.fault(Fault::corrupt(what))),
            Err(ReadError::Prepare(error)) => return Err(self.no_room(error, PAGE)),
        };
        self.note(which, seen, found.map_or(0, |(version, _)| version))?;
        match found {
            None => Ok(T::default()),
            Some((version, len)) => decode(bytes_of(&words, len), version).map_err(|fault| self.fault(fault)),
        }
    }

    fn wait(&self, which: Which, seen: u64, timeout: Duration) -> Result<u64, MapError> {
        let start = Instant::now();
        wait_past(&self.area(which), self.wake_word(which), seen, |word, value| {
            match timeout.checked_sub(start.elapsed()) {
                None | Some(Duration::ZERO) => Ok(false),
                Some(left) => futex_wait(word, value, left).map(|()| true),
            }
        })
        .map_err(Self::io(&self.path, "wait on"))
    }

    fn histogram(&self, places: &CoreLayout, latency: Latency) -> Option<HistogramWords<'_>> {
        let words = self.mapping.words().get(places.histograms[latency as usize].clone())?;
        HistogramWords::new(words, stats::BUCKETS)
    }

    fn core_snapshot(&self, places: &CoreLayout) -> CoreSnapshot {
        let histogram =
            |latency| self.histogram(places, latency).map(|words| words.snapshot()).unwrap_or_default();
        let mut snapshot = CoreSnapshot {
            read_ns: histogram(Latency::Read),
            write_ns: histogram(Latency::Write),
            ..CoreSnapshot::default()
        };
        for (value, word) in snapshot.counters.iter_mut().zip(&self.mapping.words()[places.counters.clone()])
        {
            *value = load_le(word, Ordering::Relaxed);
        }
        snapshot
    }
}

impl Shared {
    /// One record of a client; `None` if the map has no such core or record.
    fn client(&self, core: usize, index: usize) -> Option<RecordWords<'_>> {
        let places = self.layout.clients.as_ref()?;
        let words = self.mapping.words().get(places.record(core, index)?)?;
        RecordWords::new(words, places.counters, places.histogram_offset)
    }

    /// The word that says how many records of a core have ever been in use.
    fn clients_used(&self, core: usize) -> Option<&AtomicU64> {
        self.mapping.words().get(self.layout.clients.as_ref()?.used(core)?)
    }

    /// Makes sure that the first `count` records of a core can be touched.
    fn reserve_clients(&self, core: usize, count: usize) -> Result<(), MapError> {
        let Some(words) = self.layout.clients.as_ref().and_then(|places| places.records(core, count)) else {
            return Ok(());
        };
        let bytes = words.start * size_of::<u64>()..words.end * size_of::<u64>();
        let len = bytes.len();
        self.mapping.reserve(bytes).map_err(|error| self.no_room(error, len))
    }
}

/// Reads a map; cheap to clone, to be shared among threads. Keeps the mapping, but no role, alive.
#[derive(Clone)]
pub struct MapReader {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for MapReader {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("MapReader").field("path", &self.shared.path).finish_non_exhaustive()
    }
}

impl MapReader {
    /// The cluster that the map was made for.
    #[must_use]
    pub fn cluster(&self) -> ClusterId {
        self.shared.layout.cluster
    }

    /// The node that the map was made for.
    #[must_use]
    pub fn node(&self) -> NodeId {
        self.shared.layout.node
    }

    /// How many cores can write statistics.
    #[must_use]
    pub fn cores(&self) -> usize {
        self.shared.layout.stats.cores
    }

    /// The newest desired state; [`Desired::default`], with version 0, if none was published.
    ///
    /// # Errors
    /// [`MapError::Busy`] if the writer overtook every attempt, otherwise what is wrong with the map.
    pub fn desired(&self) -> Result<Desired, MapError> {
        self.shared.read(Which::Desired, Desired::decode)
    }

    /// The version of the newest desired state: one atomic load.
    #[must_use]
    pub fn desired_version(&self) -> u64 {
        self.shared.latest(Which::Desired)
    }

    /// Sleeps until the desired version is not `seen`, at most for `timeout`, and returns it.
    ///
    /// # Errors
    /// [`MapError::Io`] if the kernel refuses to wait.
    pub fn wait_desired(&self, seen: u64, timeout: Duration) -> Result<u64, MapError> {
        self.shared.wait(Which::Desired, seen, timeout)
    }

    /// The futex word that changes with every desired version, for waiting by other means (`IORING_OP_FUTEX_WAIT` with
    /// `FUTEX2_SIZE_U32` and without `FUTEX2_PRIVATE`): load it, then compare [`desired_version`](Self::desired_version)
    /// with the version that was acted on, and wait for the loaded value only if they are equal. It is only to be
    /// loaded, and this reader must outlive the wait.
    #[must_use]
    pub fn desired_wake_word(&self) -> &std::sync::atomic::AtomicU32 {
        self.shared.wake_word(Which::Desired)
    }

    /// The newest observed state; [`Observed::default`], with version 0, if none was published.
    ///
    /// # Errors
    /// [`MapError::Busy`] if the writer overtook every attempt, otherwise what is wrong with the map.
    pub fn observed(&self) -> Result<Observed, MapError> {
        self.shared.read(Which::Observed, Observed::decode)
    }

    /// The version of the newest observed state: one atomic load.
    #[must_use]
    pub fn observed_version(&self) -> u64 {
        self.shared.latest(Which::Observed)
    }

    /// Sleeps until the observed version is not `seen`, at most for `timeout`, and returns it.
    ///
    /// # Errors
    /// [`MapError::Io`] if the kernel refuses to wait.
    pub fn wait_observed(&self, seen: u64, timeout: Duration) -> Result<u64, MapError> {
        self.shared.wait(Which::Observed, seen, timeout)
    }

    /// What every core has counted since the map was made, by core index.
    #[must_use]
    pub fn stats(&self) -> Vec<CoreSnapshot> {
        let cores = (0..self.cores()).filter_map(|core| self.shared.layout.stats.core(core));
        cores.map(|places| self.shared.core_snapshot(&places)).collect()
    }

    /// The clients of all exports, each with what it has asked of one export since the data plane started or since its
    /// record was given to it. Empty if the map is of level 1, which has none.
    ///
    /// # Errors
    /// [`MapError::NoSpace`] if memory for the records cannot be had.
    pub fn clients(&self) -> Result<Vec<ClientSnapshot>, MapError> {
        let mut clients = Vec::new();
        for core in 0..self.cores() {
            let Some(used) = self.shared.clients_used(core) else { break };
            let per_core = self.shared.layout.clients.as_ref().map_or(0, |places| places.per_core);
            let used =
                usize::try_from(load_le(used, Ordering::Acquire)).map_or(per_core, |used| used.min(per_core));
            self.shared.reserve_clients(core, used)?;
            let core_number = u16::try_from(core).unwrap_or(u16::MAX);
            let records = (0..used).filter_map(|index| self.shared.client(core, index));
            clients.extend(records.filter_map(|record| record.snapshot(core_number)));
        }
        Ok(clients)
    }

    /// The clients of the export at this address; see [`clients`](Self::clients).
    ///
    /// # Errors
    /// As [`clients`](Self::clients).
    pub fn clients_of(&self, shelf: u16, slot: u8) -> Result<Vec<ClientSnapshot>, MapError> {
        let mut clients = self.clients()?;
        clients.retain(|client| (client.shelf, client.slot) == (shelf, slot));
        Ok(clients)
    }

    /// The time that the data plane last passed to [`DataMap::beat`], in nanoseconds; 0: never.
    #[must_use]
    pub fn data_plane_alive_ns(&self) -> u64 {
        load_le(self.shared.signal(Signal::DataPlaneBeat), Ordering::Relaxed)
    }

    /// The time that the control process last passed to [`ControlMap::beat`], in nanoseconds; 0: never.
    #[must_use]
    pub fn control_alive_ns(&self) -> u64 {
        load_le(self.shared.signal(Signal::ControlBeat), Ordering::Relaxed)
    }
}

/// A role on a map, given back when the last handle that writes under it is gone.
struct RoleGuard {
    shared: Arc<Shared>,
    role: Role,
}

impl RoleGuard {
    fn take(shared: Shared, role: Role) -> Result<Self, MapError> {
        shared.take(role)?;
        Ok(Self { shared: Arc::new(shared), role })
    }
}

impl Drop for RoleGuard {
    fn drop(&mut self) {
        // The kernel takes the lock back at the latest when the mapping's file is closed.
        let _ = self.shared.mapping.release(self.role);
    }
}

/// The control process's handle: the one writer of the desired state.
pub struct ControlMap {
    reader: MapReader,
    _role: RoleGuard,
    scratch: Vec<u8>,
}

impl std::fmt::Debug for ControlMap {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("ControlMap").field("path", &self.reader.shared.path).finish_non_exhaustive()
    }
}

impl ControlMap {
    /// Makes a new, empty map and puts it in the place of whatever is at `path`, atomically: no process ever sees half
    /// a map, and a reader that has the old map open keeps it. A file that is no map is left alone.
    ///
    /// # Errors
    /// [`MapError::InUse`] if a live process has a role on the map to be replaced (attach to it instead, or stop that
    /// process), [`MapError::NotAMap`] if something else is there, [`MapError::Invalid`] for an impossible geometry, or
    /// what the system said.
    pub fn create(path: impl AsRef<Path>, geometry: &Geometry) -> Result<Self, MapError> {
        let path = path.as_ref();
        let page = layout::plan(geometry, boot_id())?;
        // Held until the rename: nobody takes a role on the old map meanwhile.
        let _old = lock_old(path)?;
        let mut name = OsString::from(path);
        name.push(".new");
        let temporary = PathBuf::from(name);
        let made = Self::make(&temporary, path, &page);
        if made.is_err() {
            let _ = std::fs::remove_file(&temporary);
        }
        made
    }

    fn make(temporary: &Path, path: &Path, page: &[u8; PAGE]) -> Result<Self, MapError> {
        match std::fs::remove_file(temporary) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(Shared::io(temporary, "remove left-over")(error));
            }
            _ => {}
        }
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(temporary);
        let file = file.map_err(Shared::io(temporary, "create"))?;
        let file_len = layout::file_len(page);
        file.set_len(file_len).map_err(Shared::io(temporary, "size"))?;
        file.write_all_at(page, 0).map_err(Shared::io(temporary, "write"))?;
        let shared = Shared::attach(path, file)?;
        let role = RoleGuard::take(shared, Role::Control)?;
        std::fs::rename(temporary, path).map_err(Shared::io(path, "put in place"))?;
        Ok(Self::with(role))
    }

    /// Attaches to an existing map, after a restart or an upgrade: goes on with the next version, whatever the
    /// predecessor died in the middle of.
    ///
    /// # Errors
    /// What is wrong with the map, or [`MapError::InUse`] if another control process has it.
    pub fn attach(path: impl AsRef<Path>) -> Result<Self, MapError> {
        let path = path.as_ref();
        let shared = Shared::attach(path, Shared::open(path)?)?;
        let map = Self::with(RoleGuard::take(shared, Role::Control)?);
        // The predecessor may have died between publishing and waking.
        map.reader.shared.wake(Which::Desired);
        Ok(map)
    }

    fn with(role: RoleGuard) -> Self {
        Self { reader: MapReader { shared: Arc::clone(&role.shared) }, _role: role, scratch: Vec::new() }
    }

    /// A handle for reading only.
    #[must_use]
    pub fn reader(&self) -> &MapReader {
        &self.reader
    }

    /// Publishes a desired state as the next version, sets `desired.version` to it, wakes the data plane and returns
    /// the version.
    ///
    /// # Errors
    /// [`MapError::Invalid`], [`MapError::TooBig`] or [`MapError::NoSpace`]: then the former version stays the newest
    /// and `desired` is unchanged.
    pub fn publish(&mut self, desired: &mut Desired) -> Result<u64, MapError> {
        let layout = &self.reader.shared.layout;
        if (desired.cluster, desired.node) != (layout.cluster, layout.node) {
            let what = format!(
                "the desired state is for node {} of cluster {}, the map for node {} of cluster {}",
                desired.node, desired.cluster, layout.node, layout.cluster
            );
            return Err(MapError::Invalid { what });
        }
        if desired.cores.len() > layout.stats.cores {
            let what = format!("{} cores, the map has room for {}", desired.cores.len(), layout.stats.cores);
            return Err(MapError::Invalid { what });
        }
        desired.encode(&mut self.scratch)?;
        desired.version = self.reader.shared.publish(Which::Desired, &self.scratch)?;
        Ok(desired.version)
    }

    /// The desired state that was published last, by this process or its predecessor; see [`MapReader::desired`].
    ///
    /// # Errors
    /// As [`MapReader::desired`].
    pub fn desired(&self) -> Result<Desired, MapError> {
        self.reader.desired()
    }

    /// The newest observed state; see [`MapReader::observed`].
    ///
    /// # Errors
    /// As [`MapReader::observed`].
    pub fn observed(&self) -> Result<Observed, MapError> {
        self.reader.observed()
    }

    /// What every core has counted; see [`MapReader::stats`].
    #[must_use]
    pub fn stats(&self) -> Vec<CoreSnapshot> {
        self.reader.stats()
    }

    /// The data plane's last sign of life; see [`MapReader::data_plane_alive_ns`].
    #[must_use]
    pub fn data_plane_alive_ns(&self) -> u64 {
        self.reader.data_plane_alive_ns()
    }

    /// Whether a data plane is attached now: true from its attaching until the kernel has taken its memory away.
    ///
    /// # Errors
    /// [`MapError::Io`] if the lock cannot be asked for.
    pub fn data_plane_attached(&self) -> Result<bool, MapError> {
        let shared = &self.reader.shared;
        shared.mapping.is_taken(Role::DataPlane).map_err(Shared::io(&shared.path, "lock"))
    }

    /// Gives a sign of life: the time now, in nanoseconds of the boot-time clock (`CLOCK_BOOTTIME`).
    pub fn beat(&self, now_ns: u64) {
        store_le(self.reader.shared.signal(Signal::ControlBeat), now_ns, Ordering::Relaxed);
    }
}

/// Takes both roles on the map that is to be replaced, if there is one; anything else is left alone.
fn lock_old(path: &Path) -> Result<Option<Mapping>, MapError> {
    let file = match Shared::open(path) {
        Err(MapError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    let metadata = file.metadata().map_err(Shared::io(path, "read"))?;
    let mut page = [0; PAGE];
    if !metadata.is_file() || file.read_exact_at(&mut page, 0).is_err() || !layout::is_map(&page) {
        return Err(Fault::NotAMap.at(path));
    }
    let old = Mapping::new(file, PAGE).map_err(Shared::io(path, "map"))?;
    for role in [Role::Control, Role::DataPlane] {
        if !old.take(role).map_err(Shared::io(path, "lock"))? {
            return Err(MapError::InUse { path: path.to_owned(), role });
        }
    }
    Ok(Some(old))
}

/// The data plane's handle: the one writer of the observed state, and the source of the cores' statistics handles.
pub struct DataMap {
    reader: MapReader,
    role: Arc<RoleGuard>,
    scratch: Vec<u8>,
}

impl std::fmt::Debug for DataMap {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("DataMap").field("path", &self.reader.shared.path).finish_non_exhaustive()
    }
}

impl DataMap {
    /// Attaches to an existing map; goes on with the next observed version, whatever a predecessor died in the middle
    /// of. Statistics go on from where they were.
    ///
    /// # Errors
    /// What is wrong with the map, or [`MapError::InUse`] if another data plane has it.
    pub fn attach(path: impl AsRef<Path>) -> Result<Self, MapError> {
        let path = path.as_ref();
        let shared = Shared::attach(path, Shared::open(path)?)?;
        let role = Arc::new(RoleGuard::take(shared, Role::DataPlane)?);
        let reader = MapReader { shared: Arc::clone(&role.shared) };
        reader.shared.wake(Which::Observed);
        Ok(Self { reader, role, scratch: Vec::new() })
    }

    /// A handle for reading only, for other threads.
    #[must_use]
    pub fn reader(&self) -> &MapReader {
        &self.reader
    }

    /// The newest desired state; see [`MapReader::desired`].
    ///
    /// # Errors
    /// As [`MapReader::desired`].
    pub fn desired(&self) -> Result<Desired, MapError> {
        self.reader.desired()
    }

    /// The version of the newest desired state: one atomic load.
    #[must_use]
    pub fn desired_version(&self) -> u64 {
        self.reader.desired_version()
    }

    /// Sleeps until the desired version is not `seen`; see [`MapReader::wait_desired`].
    ///
    /// # Errors
    /// As [`MapReader::wait_desired`].
    pub fn wait_desired(&self, seen: u64, timeout: Duration) -> Result<u64, MapError> {
        self.reader.wait_desired(seen, timeout)
    }

    /// Publishes an observed state as the next version, sets `observed.version` to it, wakes who waits for it and
    /// returns the version. Errors and notes longer than [`MAX_NOTE_BYTES`](crate::MAX_NOTE_BYTES) are cut.
    ///
    /// # Errors
    /// [`MapError::TooBig`] or [`MapError::NoSpace`]: then the former version stays the newest and `observed` is
    /// unchanged.
    pub fn publish_observed(&mut self, observed: &mut Observed) -> Result<u64, MapError> {
        observed.encode(&mut self.scratch)?;
        observed.version = self.reader.shared.publish(Which::Observed, &self.scratch)?;
        Ok(observed.version)
    }

    /// The statistics of core index `core` (from 0), to be written by one thread; one handle per core at a time.
    ///
    /// # Errors
    /// [`MapError::Core`] if the map has no such core or another handle writes it.
    pub fn core_stats(&self, core: u16) -> Result<CoreStats, MapError> {
        let index = usize::from(core);
        let shared = &self.reader.shared;
        let (Some(taken), Some(places)) = (shared.taken.get(index), shared.layout.stats.core(index)) else {
            return Err(MapError::Core { core, why: "the map was created for fewer cores" });
        };
        if taken.swap(true, Ordering::AcqRel) {
            return Err(MapError::Core { core, why: "another handle of this process writes them" });
        }
        Ok(CoreStats { role: Arc::clone(&self.role), core: index, places, one_thread: PhantomData })
    }

    /// The records of the clients of core index `core` (from 0), all without owner, to be written by one thread; one
    /// handle per core at a time.
    ///
    /// # Errors
    /// [`MapError::Core`] if the map has no such core or another handle writes them, [`MapError::NoSpace`] if memory for
    /// them cannot be had.
    pub fn core_clients(&self, core: u16) -> Result<CoreClients, MapError> {
        let index = usize::from(core);
        let shared = &self.reader.shared;
        let Some(taken) = shared.clients_taken.get(index) else {
            return Err(MapError::Core { core, why: "the map was created for fewer cores" });
        };
        let places = shared.layout.clients.as_ref();
        let per_core = places.map_or(0, |places| places.per_core);
        shared.reserve_clients(index, per_core)?;
        if taken.swap(true, Ordering::AcqRel) {
            return Err(MapError::Core { core, why: "another handle of this process writes its clients" });
        }
        let clients = CoreClients {
            role: Arc::clone(&self.role),
            core: index,
            records: places.and_then(|places| places.records(index, per_core)).unwrap_or_default(),
            stride: places.map_or(0, |places| places.stride),
            counters: places.map_or(0, |places| places.counters),
            histogram_offset: places.map_or(0, |places| places.histogram_offset),
            per_core,
            one_thread: PhantomData,
        };
        clients.clear();
        Ok(clients)
    }

    /// Gives a sign of life: the time now, in nanoseconds of the boot-time clock (`CLOCK_BOOTTIME`).
    pub fn beat(&self, now_ns: u64) {
        store_le(self.reader.shared.signal(Signal::DataPlaneBeat), now_ns, Ordering::Relaxed);
    }
}

/// The statistics of one core, for the thread that runs it: can be sent to that thread, but not shared.
///
/// Every update is a plain load and store: no locked instruction, no allocation, no system call.
pub struct CoreStats {
    role: Arc<RoleGuard>,
    core: usize,
    places: CoreLayout,
    one_thread: PhantomData<Cell<()>>,
}

impl std::fmt::Debug for CoreStats {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("CoreStats").field("core", &self.core).finish_non_exhaustive()
    }
}

impl CoreStats {
    /// Adds to a counter.
    #[inline]
    pub fn add(&self, counter: Counter, amount: u64) {
        let counters = &self.role.shared.mapping.words()[self.places.counters.clone()];
        // A map of the former level may lack the newest counters.
        if let Some(word) = counters.get(counter as usize) {
            stats::add(word, amount);
        }
    }

    /// Counts a duration of `ns` nanoseconds.
    #[inline]
    pub fn record(&self, latency: Latency, ns: u64) {
        if let Some(words) = self.role.shared.histogram(&self.places, latency) {
            words.record(bucket_of(ns), ns);
        }
    }

    /// What this core has counted so far.
    #[must_use]
    pub fn snapshot(&self) -> CoreSnapshot {
        self.role.shared.core_snapshot(&self.places)
    }
}

impl Drop for CoreStats {
    fn drop(&mut self) {
        self.role.shared.taken[self.core].store(false, Ordering::Release);
    }
}

/// The records of the clients of one core, for the thread that runs it: can be sent to that thread, but not shared.
///
/// Every update is plain loads and stores: no locked instruction, no allocation, no system call. What a map cannot hold is
/// not written.
pub struct CoreClients {
    role: Arc<RoleGuard>,
    core: usize,
    /// The core's records in the map, in words, and what a record is.
    records: Range<usize>,
    stride: usize,
    counters: usize,
    histogram_offset: usize,
    per_core: usize,
    one_thread: PhantomData<Cell<()>>,
}

impl std::fmt::Debug for CoreClients {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("CoreClients").field("core", &self.core).finish_non_exhaustive()
    }
}

impl CoreClients {
    #[inline]
    fn with(&self, record: u32, act: impl FnOnce(&RecordWords<'_>)) {
        let (record, records) = (record as usize, &self.role.shared.mapping.words()[self.records.clone()]);
        if record < self.per_core
            && let Some(words) = records.get(record * self.stride..(record + 1) * self.stride)
            && let Some(words) = RecordWords::new(words, self.counters, self.histogram_offset)
        {
            act(&words);
        }
    }

    /// Takes the records of a former data plane from their owners.
    fn clear(&self) {
        let Some(used) = self.role.shared.clients_used(self.core) else { return };
        for record in 0..u32::try_from(self.per_core).unwrap_or(u32::MAX) {
            self.take_away(record);
        }
        store_le(used, 0, Ordering::Release);
    }

    /// Gives record `record` to the client `mac` of the export `shelf`.`slot`; all its counts begin at zero. `now_ns` is of
    /// `CLOCK_MONOTONIC`.
    pub fn give(&self, record: u32, mac: [u8; 6], shelf: u16, slot: u8, now_ns: u64) {
        self.with(record, |words| words.exchange(mac_number(mac), address_number(shelf, slot), now_ns));
        if let Some(used) = self.role.shared.clients_used(self.core) {
            let wanted = u64::from(record) + 1;
            if wanted <= self.per_core as u64 && load_le(used, Ordering::Relaxed) < wanted {
                store_le(used, wanted, Ordering::Release);
            }
        }
    }

    /// Takes a record from its owner.
    pub fn take_away(&self, record: u32) {
        self.with(record, |words| words.exchange(0, 0, 0));
    }

    /// Adds to a counter of a record's owner.
    #[inline]
    pub fn add(&self, record: u32, counter: ClientCounter, amount: u64) {
        self.with(record, |words| words.add(counter, amount));
    }

    /// Counts a duration of `ns` nanoseconds for a record's owner.
    #[inline]
    pub fn record(&self, record: u32, latency: Latency, ns: u64) {
        self.with(record, |words| words.record(latency, ns));
    }

    /// Notes when a record's owner sent its newest request, in nanoseconds of `CLOCK_MONOTONIC`.
    #[inline]
    pub fn seen(&self, record: u32, now_ns: u64) {
        self.with(record, |words| words.seen(now_ns));
    }

    /// Notes how many requests of a record's owner are in progress.
    #[inline]
    pub fn in_flight(&self, record: u32, requests: u32) {
        self.with(record, |words| words.in_flight(requests.into()));
    }
}

impl Drop for CoreClients {
    fn drop(&mut self) {
        self.role.shared.clients_taken[self.core].store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod killed_tests;
#[cfg(test)]
mod tests;
