-- Version 6: where the broker goes on: how far samples are pruned, which guest address is next. Old events are found by age.
CREATE TABLE marks (
    name TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT;
CREATE INDEX events_by_age ON events (at);
