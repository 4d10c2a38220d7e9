//! Clients for whom a program waits: how much of its output each has, and how much of each one's input
//! arrived. A follower outlives its connection for a grace, so that a client which connects again
//! loses nothing. Plain state; [`crate::program`] holds it under its lock.

use onde_wire::session::GRACE_MS;
use std::time::{Duration, Instant};

/// Clients that vanished and are still remembered; the oldest goes first.
const LOST_MAX: usize = 8;
/// Stands for a first client that has yet to come.
const EXPECTED: u64 = 0;
const GRACE: Duration = Duration::from_millis(GRACE_MS);

/// One client, by the id it drew.
pub struct Follower {
    client: u64,
    /// Which connection speaks for it; an older one finds that it was replaced.
    connection: u64,
    lost_since: Option<Instant>,
    /// Output before this offset need not be kept for it.
    pub acked: u64,
    /// How much of its input arrived.
    pub received: u64,
    /// How much of its input the program took.
    pub accepted: u64,
}

impl Follower {
    /// The id that the client drew.
    pub fn client(&self) -> u64 {
        self.client
    }
}

/// All of them.
#[derive(Default)]
pub struct Followers {
    list: Vec<Follower>,
    connections: u64,
}

impl Followers {
    /// A first client is about to come: output is held for it within the grace.
    pub fn expect(&mut self, now: Instant) {
        let connection = self.join(EXPECTED, 0);
        self.lose(connection, now);
    }

    /// A client came: none is waited for that never did.
    pub fn arrive(&mut self) {
        self.list.retain(|follower| follower.client != EXPECTED);
    }

    /// A connection of `client` that wants output from `from` on; returns the connection's number.
    pub fn join(&mut self, client: u64, from: u64) -> u64 {
        self.connections += 1;
        self.arrive();
        let known = self.list.iter().position(|follower| follower.client == client);
        let index = known.unwrap_or_else(|| {
            let (received, accepted) = (0, 0);
            let new =
                Follower { client, connection: 0, lost_since: None, acked: 0, received, accepted };
            self.list.push(new);
            self.list.len() - 1
        });
        let follower = &mut self.list[index];
        (follower.connection, follower.lost_since) = (self.connections, None);
        follower.acked = from;
        follower.connection
    }

    /// The follower of a connection; `None` where another connection took its place.
    pub fn of(&mut self, connection: u64) -> Option<&mut Follower> {
        self.list.iter_mut().find(|follower| follower.connection == connection)
    }

    /// The follower of a client, connected or not.
    pub fn client(&mut self, client: u64) -> Option<&mut Follower> {
        self.list.iter_mut().find(|follower| follower.client == client)
    }

    /// None of them comes again.
    pub fn clear(&mut self) {
        self.list.clear();
    }

    /// The client of a connection left on purpose.
    pub fn leave(&mut self, connection: u64) {
        self.list.retain(|follower| follower.connection != connection);
    }

    /// The connection broke.
    pub fn lose(&mut self, connection: u64, now: Instant) {
        if let Some(follower) = self.of(connection) {
            follower.lost_since = Some(now);
        }
        let lost = |follower: &Follower| follower.lost_since.is_some();
        if self.list.iter().filter(|follower| lost(follower)).count() > LOST_MAX {
            let oldest = self.list.iter().filter_map(|follower| follower.lost_since).min();
            self.list
                .retain(|follower| follower.lost_since.is_none() || follower.lost_since != oldest);
        }
    }

    /// Output at and behind this offset must be kept, `u64::MAX` for none, and for how long that
    /// holds if nobody does anything.
    pub fn floor(&mut self, now: Instant) -> (u64, Option<Duration>) {
        self.list.retain(|follower| {
            follower.lost_since.is_none_or(|since| now.duration_since(since) < GRACE)
        });
        let floor = self.list.iter().map(|follower| follower.acked).min().unwrap_or(u64::MAX);
        let oldest = self.list.iter().filter_map(|follower| follower.lost_since).min();
        (floor, oldest.map(|since| GRACE.saturating_sub(now.duration_since(since))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_held_for_the_slowest_and_for_the_lost_within_the_grace() {
        let (mut followers, now) = (Followers::default(), Instant::now());
        assert_eq!(followers.floor(now), (u64::MAX, None));
        let (slow, fast) = (followers.join(1, 0), followers.join(2, 100));
        assert_eq!(followers.floor(now), (0, None));
        followers.lose(slow, now);
        assert_eq!(followers.floor(now), (0, Some(GRACE)));
        assert_eq!(followers.floor(now + GRACE), (100, None));
        followers.leave(fast);
        assert_eq!(followers.floor(now), (u64::MAX, None));
    }

    #[test]
    fn a_first_client_is_waited_for_until_one_came() {
        let (mut followers, now) = (Followers::default(), Instant::now());
        followers.expect(now);
        assert_eq!(followers.floor(now).0, 0);
        let first = followers.join(9, 50);
        assert_eq!(followers.floor(now), (50, None));
        followers.leave(first);
        assert_eq!(followers.floor(now).0, u64::MAX);
    }

    #[test]
    fn a_client_that_comes_again_keeps_its_input_and_replaces_itself() {
        let mut followers = Followers::default();
        let old = followers.join(1, 0);
        followers.of(old).unwrap().received = 5;
        let new = followers.join(1, 40);
        assert!(followers.of(old).is_none());
        assert_eq!(followers.of(new).unwrap().received, 5);
        followers.lose(old, Instant::now());
        assert_eq!(followers.floor(Instant::now()), (40, None));
    }

    #[test]
    fn few_of_the_lost_are_remembered() {
        let (mut followers, now) = (Followers::default(), Instant::now());
        for client in 0..20 {
            let connection = followers.join(client, client);
            followers.lose(connection, now + Duration::from_millis(client));
        }
        assert_eq!(followers.list.len(), LOST_MAX);
        assert_eq!(followers.floor(now + Duration::from_millis(20)).0, 12);
    }
}
