//! The address plan: every address of a cluster computed from the network and a node's number.
//! The lower half of the network belongs to nodes, 256 addresses each: `.1` is the node itself,
//! `.2` and up are its mstrap slots. The upper half belongs to guests; the broker gives them out.

/// VMs that a node can bootstrap at once: the addresses of its block behind its own.
pub const SLOTS_MAX: u32 = 253;
/// VMs that a node can have at all: a Linux bridge takes 1 023 ports, and one is the node's card. Only clones, which
/// need no mstrap, can be in the slots from [`SLOTS_MAX`] on.
pub const VMS_MAX: u32 = 1022;
/// Addresses in a node's block.
const BLOCK: u32 = 256;

/// A cluster's network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    base: u32,
    prefix_len: u8,
}

impl Plan {
    /// Takes a network between /10 and /22; `None` for others, or where host bits are set.
    pub fn new(base: [u8; 4], prefix_len: u8) -> Option<Self> {
        let base = u32::from_be_bytes(base);
        let plan = Self { base, prefix_len };
        ((10..=22).contains(&prefix_len) && base & (plan.size() - 1) == 0).then_some(plan)
    }

    /// Reads `a.b.c.d/len`.
    pub fn parse(text: &str) -> Option<Self> {
        let (address, prefix_len) = text.trim().split_once('/')?;
        let address: core::net::Ipv4Addr = address.parse().ok()?;
        Self::new(address.octets(), prefix_len.parse().ok()?)
    }

    fn size(&self) -> u32 {
        1 << (32 - u32::from(self.prefix_len))
    }

    /// Length of the network prefix.
    pub fn prefix_len(&self) -> u8 {
        self.prefix_len
    }

    /// Number of nodes the plan has room for. The last block stays free: owners' machines live there.
    pub fn nodes_max(&self) -> u32 {
        self.size() / 2 / BLOCK - 1
    }

    /// Address of node `number`.
    pub fn node(&self, number: u32) -> [u8; 4] {
        (self.base + number * BLOCK + 1).to_be_bytes()
    }

    /// Address of mstrap in slot `slot` of node `number`.
    pub fn mstrap(&self, number: u32, slot: u32) -> [u8; 4] {
        (self.base + number * BLOCK + 2 + slot).to_be_bytes()
    }

    /// First address of the owner's own block: the broker, or a customer's machine on the same LAN.
    pub fn owner(&self) -> [u8; 4] {
        self.node(self.nodes_max())
    }

    /// Number of guest addresses.
    pub fn guests_max(&self) -> u32 {
        self.size() / 2 - 2
    }

    /// Guest address number `index`, from 0.
    pub fn guest(&self, index: u32) -> [u8; 4] {
        (self.base + self.size() / 2 + 1 + index).to_be_bytes()
    }
}

/// The MAC that goes with an address: locally administered, and no two addresses share one.
pub fn mac(ipv4: [u8; 4]) -> [u8; 6] {
    [0x02, 0x4f, ipv4[0], ipv4[1], ipv4[2], ipv4[3]]
}
