//! Requests and answers, byte by byte.

/// An Ethernet address.
pub type Mac = [u8; 6];

/// All stations.
pub const EVERYONE: Mac = [0xff; 6];

/// A request that can be bent before it is sent.
#[derive(Debug, Clone)]
pub struct Request {
    /// Destination.
    pub dst: Mac,
    /// Source.
    pub src: Mac,
    /// EtherType.
    pub ethertype: u16,
    /// Version and flags.
    pub version_flags: u8,
    /// Shelf.
    pub shelf: u16,
    /// Slot.
    pub slot: u8,
    /// Command.
    pub command: u8,
    /// Tag.
    pub tag: u32,
    /// What follows the header.
    pub argument: Vec<u8>,
}

impl Request {
    /// Query Config.
    #[must_use]
    pub fn config(ccmd: u8, string: &[u8]) -> Request {
        let [high, low] = u16::try_from(string.len()).unwrap().to_be_bytes();
        Request::of(1, [&[0, 0, 0, 0, 0, ccmd, high, low], string].concat())
    }

    /// ATA, with 48-bit registers.
    #[must_use]
    pub fn ata(command: u8, lba: u64, count: u8, data: &[u8]) -> Request {
        let write = u8::from(matches!(command, 0x30 | 0x34));
        let l = lba.to_le_bytes();
        let head = [0x40 | write, 0, count, command, l[0], l[1], l[2], l[3], l[4], l[5], 0, 0];
        Request::of(0, [&head, data].concat())
    }

    /// READ SECTORS EXT.
    #[must_use]
    pub fn read(lba: u64, count: u8) -> Request {
        Request::ata(0x24, lba, count, &[])
    }

    /// WRITE SECTORS EXT of whole sectors.
    #[must_use]
    pub fn write(lba: u64, data: &[u8]) -> Request {
        Request::ata(0x34, lba, u8::try_from(data.len() / 512).unwrap(), data)
    }

    /// IDENTIFY DEVICE, as Linux sends it.
    #[must_use]
    pub fn identify() -> Request {
        Request::of(0, vec![0, 0, 1, 0xec, 0, 0, 0, 0xa0, 0, 0, 0, 0])
    }

    /// MAC Mask List.
    #[must_use]
    pub fn masks(mcmd: u8, directives: &[(u8, Mac)]) -> Request {
        let mut argument = vec![0, mcmd, 0, u8::try_from(directives.len()).unwrap()];
        for (dcmd, mac) in directives {
            argument.extend([0, *dcmd]);
            argument.extend(mac);
        }
        Request::of(2, argument)
    }

    /// Reserve/Release.
    #[must_use]
    pub fn reserve(rcmd: u8, macs: &[Mac]) -> Request {
        let count = u8::try_from(macs.len()).unwrap();
        Request::of(3, [&[rcmd, count], macs.as_flattened()].concat())
    }

    /// Any command, for the first export from the first client; the rest is filled in when it is sent.
    #[must_use]
    pub fn of(command: u8, argument: Vec<u8>) -> Request {
        Request {
            dst: [0; 6],
            src: [0; 6],
            ethertype: 0x88a2,
            version_flags: 0x10,
            shelf: 0,
            slot: 0,
            command,
            tag: 0,
            argument,
        }
    }

    /// The frame.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let mut frame = [self.dst, self.src].concat();
        frame.extend(self.ethertype.to_be_bytes());
        frame.extend([self.version_flags, 0]);
        frame.extend(self.shelf.to_be_bytes());
        frame.extend([self.slot, self.command]);
        frame.extend(self.tag.to_be_bytes());
        frame.extend(&self.argument);
        frame
    }
}

/// An answer.
#[derive(Debug, Clone)]
pub struct Reply(pub Vec<u8>);

impl Reply {
    fn u16_at(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.0[at], self.0[at + 1]])
    }

    /// Destination.
    #[must_use]
    pub fn dst(&self) -> Mac {
        self.0[..6].try_into().unwrap()
    }

    /// Source.
    #[must_use]
    pub fn src(&self) -> Mac {
        self.0[6..12].try_into().unwrap()
    }

    /// Version and flags.
    #[must_use]
    pub fn version_flags(&self) -> u8 {
        self.0[14]
    }

    /// The AoE error; 0 without the error flag.
    #[must_use]
    pub fn error(&self) -> u8 {
        assert_eq!(self.0[14] & 4 != 0, self.0[15] != 0, "the error flag goes with an error");
        self.0[15]
    }

    /// Shelf and slot.
    #[must_use]
    pub fn address(&self) -> (u16, u8) {
        (self.u16_at(16), self.0[18])
    }

    /// Command.
    #[must_use]
    pub fn command(&self) -> u8 {
        self.0[19]
    }

    /// Tag.
    #[must_use]
    pub fn tag(&self) -> u32 {
        u32::from_be_bytes(self.0[20..24].try_into().unwrap())
    }

    /// (Status, Error) registers of an ATA answer without an AoE error.
    #[must_use]
    pub fn ata(&self) -> (u8, u8) {
        assert_eq!((self.command(), self.version_flags()), (0, 0x18), "an ATA answer without the error flag");
        (self.0[27], self.0[25])
    }

    /// The data of an ATA answer with this many sectors, and nothing more.
    #[must_use]
    pub fn sectors(&self, count: usize) -> &[u8] {
        assert_eq!(self.ata(), (0x40, 0));
        assert_eq!(self.0.len(), 36 + count * 512, "exactly the data that was asked for");
        &self.0[36..]
    }

    /// Word `n` of IDENTIFY data.
    #[must_use]
    pub fn word(&self, n: usize) -> u16 {
        let data = self.sectors(1);
        u16::from_le_bytes([data[2 * n], data[2 * n + 1]])
    }

    /// The size that IDENTIFY data tell, in sectors.
    #[must_use]
    pub fn size_sectors(&self) -> u64 {
        (0..4).map(|n| u64::from(self.word(100 + n)) << (16 * n)).sum()
    }

    /// (buffer count, sectors, version and sub-command) of a Query Config answer.
    #[must_use]
    pub fn config(&self) -> (u16, u8, u8) {
        assert_eq!(self.command(), 1);
        (self.u16_at(24), self.0[28], self.0[29])
    }

    /// The string of a Query Config answer.
    #[must_use]
    pub fn string(&self) -> &[u8] {
        assert_eq!(self.command(), 1);
        let end = 32 + usize::from(self.u16_at(30));
        assert!(self.0[end..].iter().all(|&b| b == 0), "padding is zeros");
        &self.0[32..end]
    }

    /// (merror, count, directives as far as the frame goes) of a MAC Mask List answer.
    #[must_use]
    pub fn masks(&self) -> (u8, u8, Vec<(u8, Mac)>) {
        assert_eq!((self.command(), self.version_flags()), (2, 0x18), "mask errors are no AoE errors");
        let directives = self.0[28..].chunks_exact(8).map(|d| (d[1], d[2..8].try_into().unwrap()));
        let mut all: Vec<(u8, Mac)> = directives.collect();
        while all.last() == Some(&(0, [0; 6])) {
            all.pop();
        }
        (self.0[26], self.0[27], all)
    }

    /// The list of a Reserve/Release answer.
    #[must_use]
    pub fn holders(&self) -> Vec<Mac> {
        assert_eq!(self.command(), 3);
        let end = 26 + 6 * usize::from(self.0[25]);
        assert!(self.0[end..].iter().all(|&b| b == 0), "padding is zeros");
        self.0[26..end].chunks_exact(6).map(|mac| mac.try_into().unwrap()).collect()
    }
}
