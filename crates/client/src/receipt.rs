//! Receipts, checked without anybody's help: what a settled job was, used and cost, signed by its broker (Ed25519). The
//! broker writes them, `onde receipt verify` checks them.

use crate::api::{Receipt, SettledBy, SignedReceipt};
use ed25519_dalek::{Signature, VerifyingKey};

/// Version of what is signed.
pub const RECEIPT_VERSION: u32 = 1;
/// Before the text that is signed, so that it can never be taken for anything else.
const LABEL: &[u8] = b"onde receipt\n";

/// What is wrong with a receipt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadReceipt {
    /// Somebody else signed it.
    #[error("another broker's key signed it")]
    OtherKey,
    /// It was altered, or nobody signed it.
    #[error("its signature is not over what it says")]
    Signature,
    /// Its numbers contradict each other.
    #[error("its numbers do not add up")]
    Sum,
}

impl Receipt {
    /// The bytes that are signed: the receipt as JSON without spaces, its fields in their order.
    pub fn signed_text(&self) -> Vec<u8> {
        let json = serde_json::to_vec(self).expect("plain fields");
        [LABEL, &json].concat()
    }
}

impl SignedReceipt {
    /// Checks it against a broker's key.
    pub fn verify(&self, key: &[u8; 32]) -> Result<(), BadReceipt> {
        if self.key.0 != *key {
            return Err(BadReceipt::OtherKey);
        }
        let key = VerifyingKey::from_bytes(key).map_err(|_| BadReceipt::Signature)?;
        key.verify_strict(&self.receipt.signed_text(), &Signature::from_bytes(&self.signature.0))
            .map_err(|_| BadReceipt::Signature)?;
        let receipt = &self.receipt;
        let paid = u64::from(receipt.sold).checked_mul(receipt.value_micro);
        let all_back = receipt.refund_micro == receipt.paid_micro;
        let adds_up = paid == Some(receipt.paid_micro)
            && receipt.refund_micro <= receipt.paid_micro
            && (receipt.settled_by != SettledBy::Unused || all_back);
        if adds_up { Ok(()) } else { Err(BadReceipt::Sum) }
    }
}
