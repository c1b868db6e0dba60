//! The counters of simulated nodes: cores count into a map of shared memory, which here is the thread's own and read by nobody.

use std::cell::OnceCell;

use cluster_map::{ClusterId, ControlMap, CoreClients, CoreStats, DataMap, Geometry, NodeId};

/// Places for counters: as many as nodes of a thread run at a time.
const CORES: u16 = 32;

struct Counters {
    map: DataMap,
    _control: ControlMap,
    _folder: tempfile::TempDir,
}

impl Counters {
    fn new() -> Counters {
        let folder = tempfile::tempdir_in("/dev/shm").expect("memory has room for a file");
        let path = folder.path().join("map");
        let geometry = Geometry::new(CORES, ClusterId([1; 16]), NodeId([1; 16]));
        let control = ControlMap::create(&path, &geometry).expect("a map can be made");
        let map = DataMap::attach(&path).expect("it is there");
        Counters { map, _control: control, _folder: folder }
    }
}

thread_local! {
    static COUNTERS: OnceCell<Counters> = const { OnceCell::new() };
}

/// Counters that no other node of the thread has.
pub(super) fn take() -> (CoreStats, CoreClients) {
    COUNTERS.with(|counters| {
        let map = &counters.get_or_init(Counters::new).map;
        let free = |core: u16| map.core_stats(core).ok().zip(map.core_clients(core).ok());
        (0..CORES).find_map(free).expect("a thread runs one cluster at a time")
    })
}
