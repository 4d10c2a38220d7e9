//! Boot tokens, payment tokens and redemption certificates: made by the broker, checked by
//! nodes, and the other way round for certificates. `packetd` checks a boot token's tag
//! before anything else sees it.

use crate::bytes::{Reader, Writer};
use crate::chain;
use crate::key::{Key, Tag};
use crate::packet::Prices;

/// 16 bytes that name a job, chosen at random by the broker.
pub type JobId = [u8; 16];
/// 16 bytes that name a node (see [`crate::key::node_id`]).
pub type NodeId = [u8; 16];
/// 16 random bytes drawn at every boot of a node; tokens die with it.
pub type Incarnation = [u8; 16];

/// "ONDEBOOT", first in every boot token: keeps its tag apart from all other uses of the node key.
const BOOT_MAGIC: [u8; 8] = *b"ONDEBOOT";
/// Bytes of a boot token without its tag.
pub const BOOT_TOKEN_SIZE: usize = 230;

/// Where a VM's memory comes from, and what becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The customer's loader writes it, and it runs.
    Loader,
    /// The customer's loader writes it, and it stands still: a template for clones on this node.
    Template,
    /// That of this template, whose pages it shares until it writes them.
    Clone(JobId),
}

/// What a customer bought: one VM of this shape on this node, in this life of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootToken {
    /// Which of the broker's keys made it (first bytes of the digest of the cluster secret).
    pub broker_key: [u8; 8],
    /// The node it is for.
    pub node: NodeId,
    /// The node's incarnation it is for.
    pub incarnation: Incarnation,
    /// The job it starts; a node starts a job once.
    pub job: JobId,
    /// Last moment it can be shown for the first time, in milliseconds of the node's uptime.
    pub expiry_ms: u64,
    /// Chain value that the next payment token must lead to.
    pub anchor: chain::Value,
    /// Micro-tokens that each payment token of this job is worth.
    pub value_micro: u64,
    /// Number of payment tokens that this boot token already pays.
    pub first_count: u32,
    /// SHA-256 of the loader that mstrap shall accept.
    pub loader_sha256: [u8; 32],
    /// Memory, MiB.
    pub mem_mib: u32,
    /// Memory that it may hold, MiB, which is what it pays for: `mem_mib`, or for a clone all that it may have for itself.
    pub held_mib: u32,
    /// Where its memory comes from.
    pub origin: Origin,
    /// Number of vCPUs.
    pub vcpus: u16,
    /// Disk, MiB; 0 for none.
    pub disk_mib: u32,
    /// Most KiB a second that the VM may send; 0 for no limit of its own.
    pub net_kib_s: u32,
    /// MAC of the guest.
    pub mac: [u8; 6],
    /// IPv4 address of the guest.
    pub ipv4: [u8; 4],
    /// Gateway of the guest, all zero for none.
    pub gateway: [u8; 4],
    /// Length of the guest's network prefix.
    pub prefix_len: u8,
    /// What the node charges for this job.
    pub prices: Prices,
}

impl BootToken {
    /// The token's bytes, without its tag.
    pub fn emit(&self) -> [u8; BOOT_TOKEN_SIZE] {
        let mut out = [0; BOOT_TOKEN_SIZE];
        let mut w = Writer::new(&mut out);
        w.put(&BOOT_MAGIC);
        w.put(&self.broker_key);
        w.put(&self.node);
        w.put(&self.incarnation);
        w.put(&self.job);
        w.put(&self.expiry_ms.to_le_bytes());
        w.put(&self.anchor);
        w.put(&self.value_micro.to_le_bytes());
        w.put(&self.first_count.to_le_bytes());
        w.put(&self.loader_sha256);
        w.put(&self.mem_mib.to_le_bytes());
        w.put(&self.vcpus.to_le_bytes());
        w.put(&self.disk_mib.to_le_bytes());
        w.put(&self.net_kib_s.to_le_bytes());
        w.put(&self.mac);
        w.put(&self.ipv4);
        w.put(&self.gateway);
        let (kind, template) = match self.origin {
            Origin::Loader => (0, [0; 16]),
            Origin::Template => (1, [0; 16]),
            Origin::Clone(template) => (2, template),
        };
        w.put(&[self.prefix_len, kind]);
        w.put(&template);
        w.put(&self.held_mib.to_le_bytes());
        self.prices.emit(&mut w);
        out
    }

    /// The tag that makes it valid at the node whose key this is.
    pub fn sign(&self, node_key: &Key) -> Tag {
        node_key.tag(&[&self.emit()])
    }

    /// Reads a token whose tag was checked over the same bytes; `None` if it is of another version.
    pub fn parse(bytes: &[u8; BOOT_TOKEN_SIZE]) -> Option<Self> {
        let mut r = Reader::new(bytes);
        if r.array()? != BOOT_MAGIC {
            return None;
        }
        let mut token = Self {
            broker_key: r.array()?,
            node: r.array()?,
            incarnation: r.array()?,
            job: r.array()?,
            expiry_ms: r.u64()?,
            anchor: r.array()?,
            value_micro: r.u64()?,
            first_count: r.u32()?,
            loader_sha256: r.array()?,
            mem_mib: r.u32()?,
            held_mib: 0,
            origin: Origin::Loader,
            vcpus: r.u16()?,
            disk_mib: r.u32()?,
            net_kib_s: r.u32()?,
            mac: r.array()?,
            ipv4: r.array()?,
            gateway: r.array()?,
            prefix_len: r.u8()?,
            prices: Prices::default(),
        };
        token.origin = match (r.u8()?, r.array()?) {
            (0, _) => Origin::Loader,
            (1, _) => Origin::Template,
            (2, template) => Origin::Clone(template),
            _ => return None,
        };
        token.held_mib = r.u32()?;
        token.prices = Prices::parse(&mut r)?;
        Some(token)
    }
}

/// A payment token: chain value number `index`. It pays for every token up to that number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PaymentToken {
    /// How many tokens of the job's chain are paid once this one is shown (the boot token's included).
    pub index: u32,
    /// The chain value.
    pub value: chain::Value,
}

/// "ONDENEXT", first in what a renewal's tag covers: keeps it apart from all other uses of the node key.
const RENEWAL_MAGIC: [u8; 8] = *b"ONDENEXT";

/// A new chain for a job whose chain is used up. The broker makes it, one for each chain's end, and the job's node takes
/// it as it takes a boot token. It pays nothing: token `index` + 1 leads to `anchor`, and counts on from there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Renewal {
    /// Index of the last token of the chain before.
    pub index: u32,
    /// Chain value that the next payment token must lead to.
    pub anchor: chain::Value,
}

impl Renewal {
    /// The tag that makes it valid for one job, in one life of the node whose key this is.
    pub fn sign(&self, node_key: &Key, job: &JobId, incarnation: &Incarnation) -> Tag {
        let index = self.index.to_le_bytes();
        node_key.tag(&[&RENEWAL_MAGIC, incarnation, job, &index, &self.anchor])
    }

    /// Whether `tag` is that tag.
    pub fn verify(&self, node_key: &Key, job: &JobId, life: &Incarnation, tag: &Tag) -> bool {
        let index = self.index.to_le_bytes();
        node_key.verify(&[&RENEWAL_MAGIC, life, job, &index, &self.anchor], tag)
    }
}

/// "ONDECERT", first in every certificate.
const CERT_MAGIC: [u8; 8] = *b"ONDECERT";
/// Bytes of a redemption certificate, tag included.
pub const CERTIFICATE_SIZE: usize = 112;

/// A node's statement about a job that has ended: what it took in and what it did not use.
/// Paid = `last_index` x value = `spent_micro` + `unused_micro`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// The job.
    pub job: JobId,
    /// The node.
    pub node: NodeId,
    /// The node's incarnation.
    pub incarnation: Incarnation,
    /// Number of payment tokens that the node accepted, the boot token's included.
    pub last_index: u32,
    /// Micro-tokens charged.
    pub spent_micro: u64,
    /// Micro-tokens to give back.
    pub unused_micro: u64,
}

impl Certificate {
    /// The certificate's bytes with its tag under the node's certificate key.
    pub fn sign(&self, certificate_key: &Key) -> [u8; CERTIFICATE_SIZE] {
        let mut out = [0; CERTIFICATE_SIZE];
        let mut w = Writer::new(&mut out);
        w.put(&CERT_MAGIC);
        w.put(&self.job);
        w.put(&self.node);
        w.put(&self.incarnation);
        w.put(&self.last_index.to_le_bytes());
        w.put(&[0; 4]);
        w.put(&self.spent_micro.to_le_bytes());
        w.put(&self.unused_micro.to_le_bytes());
        let (body, tag) = out.split_at_mut(CERTIFICATE_SIZE - 32);
        tag.copy_from_slice(&certificate_key.tag(&[body]));
        out
    }

    /// Which node's key checks this certificate: an allegation until [`Self::verify`] agrees.
    pub fn claimed_node(bytes: &[u8; CERTIFICATE_SIZE]) -> NodeId {
        let mut node = [0; 16];
        node.copy_from_slice(&bytes[24..40]);
        node
    }

    /// Reads a certificate and checks its tag; `None` if either fails.
    pub fn verify(bytes: &[u8; CERTIFICATE_SIZE], certificate_key: &Key) -> Option<Self> {
        let (body, tag) = bytes.split_last_chunk()?;
        if !certificate_key.verify(&[body], tag) {
            return None;
        }
        Self::claim(bytes)
    }

    /// What a certificate says, for people who have no key to check it with: an allegation.
    pub fn claim(bytes: &[u8; CERTIFICATE_SIZE]) -> Option<Self> {
        let mut r = Reader::new(bytes);
        if r.array()? != CERT_MAGIC {
            return None;
        }
        let (job, node, incarnation) = (r.array()?, r.array()?, r.array()?);
        let last_index = r.u32()?;
        r.u32()?;
        Some(Self {
            job,
            node,
            incarnation,
            last_index,
            spent_micro: r.u64()?,
            unused_micro: r.u64()?,
        })
    }
}
