//! Tokens. (being written)

/// A payment token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PaymentToken {
    /// How many tokens of the chain have been handed out when this one is: 1 for the first.
    pub index: u32,
    /// The chain value at that index.
    pub value: [u8; 32],
}
