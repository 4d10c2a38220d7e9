-- Version 3: keys have a scope and an end; the prices of a job's node as they were when it was sold; what the node said
-- of the job's meters, look by look.
ALTER TABLE keys ADD COLUMN scope TEXT NOT NULL DEFAULT 'customer';
ALTER TABLE keys ADD COLUMN expires_at INTEGER;
ALTER TABLE keys ADD COLUMN revoked_at INTEGER;
CREATE TABLE job_prices (
    job BLOB PRIMARY KEY,
    vcpu_s INTEGER NOT NULL,
    gib_s INTEGER NOT NULL,
    gib_sent INTEGER NOT NULL,
    disk_gib_s INTEGER NOT NULL
) STRICT;
CREATE TABLE samples (
    job BLOB NOT NULL,
    age_ms INTEGER NOT NULL,
    at INTEGER NOT NULL,
    spent_micro INTEGER NOT NULL,
    last_index INTEGER NOT NULL,
    cpu_us INTEGER NOT NULL,
    mem_mib_ms INTEGER NOT NULL,
    sent_bytes INTEGER NOT NULL,
    disk_mib_ms INTEGER NOT NULL,
    PRIMARY KEY (job, age_ms)
) STRICT;
CREATE INDEX samples_by_age ON samples (at);
