-- Version 1: accounts with a journal of single lines. What SQLite's brokers of the first days made.
CREATE TABLE accounts (
    name TEXT PRIMARY KEY,
    balance_micro INTEGER NOT NULL DEFAULT 0 CHECK (balance_micro >= 0),
    opened_at INTEGER NOT NULL
) STRICT;
CREATE TABLE keys (
    digest BLOB PRIMARY KEY,
    account TEXT NOT NULL REFERENCES accounts (name),
    issued_at INTEGER NOT NULL
) STRICT;
CREATE TABLE entries (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    account TEXT NOT NULL REFERENCES accounts (name),
    delta_micro INTEGER NOT NULL CHECK (delta_micro <> 0),
    reason TEXT NOT NULL,
    job BLOB,
    at INTEGER NOT NULL
) STRICT;
CREATE INDEX entries_of ON entries (account, id);
--@ sqlite
CREATE TRIGGER entries_move_money AFTER INSERT ON entries BEGIN
    UPDATE accounts SET balance_micro = balance_micro + NEW.delta_micro WHERE name = NEW.account;
END;
CREATE TRIGGER entries_stay BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;
CREATE TRIGGER entries_remain BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;
--@ both
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id BLOB NOT NULL UNIQUE,
    account TEXT NOT NULL REFERENCES accounts (name),
    node INTEGER NOT NULL,
    node_id BLOB NOT NULL,
    incarnation BLOB NOT NULL,
    guest INTEGER NOT NULL,
    mem_mib INTEGER NOT NULL,
    vcpus INTEGER NOT NULL,
    disk_mib INTEGER NOT NULL,
    value_micro INTEGER NOT NULL CHECK (value_micro > 0),
    first_count INTEGER NOT NULL,
    sold INTEGER NOT NULL CHECK (sold >= first_count),
    seed BLOB NOT NULL,
    expiry_ms INTEGER NOT NULL,
    booted INTEGER NOT NULL DEFAULT 0,
    spent_micro INTEGER NOT NULL DEFAULT 0,
    opened_at INTEGER NOT NULL,
    ended_at INTEGER,
    watched INTEGER NOT NULL DEFAULT 1,
    settled_by TEXT,
    settled_at INTEGER,
    refund_micro INTEGER NOT NULL DEFAULT 0 CHECK (refund_micro BETWEEN 0 AND sold * value_micro)
) STRICT;
CREATE INDEX jobs_of ON jobs (account, seq);
CREATE INDEX jobs_watched ON jobs (seq) WHERE watched = 1;
CREATE INDEX jobs_open ON jobs (node_id, incarnation) WHERE settled_at IS NULL;
CREATE INDEX jobs_unbooted ON jobs (node_id, mem_mib) WHERE settled_at IS NULL AND booted = 0;
CREATE INDEX guests_taken ON jobs (guest) WHERE settled_at IS NULL;
CREATE TABLE replies (
    scope TEXT NOT NULL,
    key TEXT NOT NULL,
    request BLOB NOT NULL,
    reply TEXT NOT NULL,
    at INTEGER NOT NULL,
    PRIMARY KEY (scope, key)
) STRICT;
CREATE INDEX replies_by_age ON replies (at);
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at INTEGER NOT NULL,
    kind TEXT NOT NULL,
    node BLOB,
    job BLOB,
    text TEXT NOT NULL
) STRICT;
