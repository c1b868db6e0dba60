//! Stands between two ends and does to their connections what a network does.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// No byte is to be changed.
const NONE: i64 = -1;

/// What all threads of a proxy look at.
struct Shared {
    /// Nothing goes through, and nothing is said about it.
    is_stalled: AtomicBool,
    /// Of the bytes that go to the target next, this one is changed.
    change_at: AtomicI64,
    open: Mutex<Vec<Passage>>,
    is_over: AtomicBool,
}

struct Passage {
    ends: [TcpStream; 2],
    is_stalled: Arc<AtomicBool>,
}

/// A proxy on loopback.
pub(crate) struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Proxy {
    pub(crate) fn new(target: SocketAddr) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            is_stalled: AtomicBool::new(false),
            change_at: AtomicI64::new(NONE),
            open: Mutex::new(Vec::new()),
            is_over: AtomicBool::new(false),
        });
        let own = Arc::clone(&shared);
        std::thread::spawn(move || {
            for from in listener.incoming().map_while(Result::ok) {
                if own.is_over.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(to) = TcpStream::connect(target) else { continue };
                from.set_nodelay(true).unwrap();
                to.set_nodelay(true).unwrap();
                let is_stalled = Arc::new(AtomicBool::new(own.is_stalled.load(Ordering::Relaxed)));
                let both = || [from.try_clone().unwrap(), to.try_clone().unwrap()];
                let passage = Passage { ends: both(), is_stalled: Arc::clone(&is_stalled) };
                own.open.lock().unwrap().push(passage);
                let ([there, back], other) = (both(), both());
                let (shared, stalled) = (Arc::clone(&own), Arc::clone(&is_stalled));
                std::thread::spawn(move || carry(there, back, &stalled, |bytes| shared.change(bytes)));
                let [from, to] = other;
                std::thread::spawn(move || carry(to, from, &is_stalled, |_| ()));
            }
        });
        Proxy { address, shared }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends all connections.
    pub(crate) fn cut(&self) {
        for passage in self.shared.open.lock().unwrap().drain(..) {
            passage.ends.iter().for_each(|end| drop(end.shutdown(Shutdown::Both)));
        }
    }

    /// Lets nothing through any more, on no connection.
    pub(crate) fn stall(&self) {
        self.shared.is_stalled.store(true, Ordering::Relaxed);
        for passage in &*self.shared.open.lock().unwrap() {
            passage.is_stalled.store(true, Ordering::Relaxed);
        }
    }

    /// Lets everything through on new connections.
    pub(crate) fn pass_new(&self) {
        self.shared.is_stalled.store(false, Ordering::Relaxed);
    }

    /// Lets everything through.
    pub(crate) fn pass(&self) {
        self.pass_new();
        for passage in &*self.shared.open.lock().unwrap() {
            passage.is_stalled.store(false, Ordering::Relaxed);
        }
    }

    /// Changes a byte of those that go to the target next.
    pub(crate) fn change_byte(&self, at: usize) {
        self.shared.change_at.store(i64::try_from(at).unwrap(), Ordering::Relaxed);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Relaxed);
        self.cut();
        // Wakes the thread that accepts.
        let _nobody_cares = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn change(&self, bytes: &mut [u8]) {
        let at = self.change_at.load(Ordering::Relaxed);
        let Ok(place) = usize::try_from(at) else { return };
        if let Some(byte) = bytes.get_mut(place) {
            *byte ^= 0x40;
            self.change_at.store(NONE, Ordering::Relaxed);
        } else {
            self.change_at.store(at - i64::try_from(bytes.len()).unwrap(), Ordering::Relaxed);
        }
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream, is_stalled: &AtomicBool, mut change: impl FnMut(&mut [u8])) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(len) = from.read(&mut buffer) {
        // What was read when nothing goes through any more is lost in the network, but TCP would send it again.
        while is_stalled.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
        }
        change(&mut buffer[..len]);
        if len == 0 || to.write_all(&buffer[..len]).is_err() {
            break;
        }
    }
    drop((from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both)));
}
