-- Version 2: double entry. An act moves money between books in lines that sum to zero; the lines come first, the
-- act seals them and is chained to the act before it by a digest. Neither is ever changed. The old journal's lines
-- become acts (`journal::adopt`).
--@ sqlite
DROP TRIGGER entries_move_money;
DROP TRIGGER entries_stay;
DROP TRIGGER entries_remain;
--@ both
CREATE TABLE books (
    name TEXT PRIMARY KEY,
    balance_micro INTEGER NOT NULL DEFAULT 0 CHECK (balance_micro >= 0 OR name LIKE 'cash:%')
) STRICT;
CREATE TABLE acts (
    seq INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    key TEXT NOT NULL UNIQUE,
    job BLOB,
    first_index INTEGER,
    last_index INTEGER,
    at INTEGER NOT NULL,
    prev BLOB NOT NULL,
    hash BLOB NOT NULL,
    UNIQUE (job, first_index),
    CHECK (last_index >= first_index AND first_index >= 1)
) STRICT;
CREATE INDEX acts_of ON acts (job, seq);
CREATE TABLE lines (
    act INTEGER NOT NULL REFERENCES acts (seq) DEFERRABLE INITIALLY DEFERRED,
    book TEXT NOT NULL REFERENCES books (name),
    delta_micro INTEGER NOT NULL CHECK (delta_micro <> 0),
    PRIMARY KEY (act, book)
) STRICT;
CREATE INDEX lines_of ON lines (book, act);
-- A job that is frozen sells nothing more: what it sold is not known for sure, since an old backup was restored.
ALTER TABLE jobs ADD COLUMN frozen INTEGER NOT NULL DEFAULT 0;
-- What is left of the job's chain. Nothing: `seed` is the start of a short one that version 1 sold, or the job is over.
ALTER TABLE jobs ADD COLUMN chain BLOB;
--@ sqlite
CREATE TRIGGER lines_open BEFORE INSERT ON lines WHEN EXISTS (SELECT 1 FROM acts WHERE seq = NEW.act)
BEGIN SELECT RAISE(ABORT, 'the act is sealed'); END;
CREATE TRIGGER lines_move AFTER INSERT ON lines BEGIN
    UPDATE books SET balance_micro = balance_micro + NEW.delta_micro WHERE name = NEW.book;
END;
CREATE TRIGGER acts_chain BEFORE INSERT ON acts WHEN
    NEW.seq <> (SELECT coalesce(max(seq), 0) + 1 FROM acts)
    OR (NEW.seq > 1 AND NEW.prev <> (SELECT hash FROM acts WHERE seq = NEW.seq - 1))
BEGIN SELECT RAISE(ABORT, 'the act does not follow the last one'); END;
CREATE TRIGGER acts_seal BEFORE INSERT ON acts WHEN
    coalesce((SELECT sum(delta_micro) FROM lines WHERE act = NEW.seq), 1) <> 0
BEGIN SELECT RAISE(ABORT, 'the act does not sum to zero'); END;
CREATE TRIGGER lines_stay BEFORE UPDATE ON lines BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;
CREATE TRIGGER lines_remain BEFORE DELETE ON lines BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;
CREATE TRIGGER acts_stay BEFORE UPDATE ON acts BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;
CREATE TRIGGER acts_remain BEFORE DELETE ON acts BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;
--@ postgres
CREATE FUNCTION lines_open() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF EXISTS (SELECT 1 FROM acts WHERE seq = NEW.act) THEN
        RAISE EXCEPTION 'the act is sealed' USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NEW;
END $$;
CREATE FUNCTION lines_move() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    UPDATE books SET balance_micro = balance_micro + NEW.delta_micro WHERE name = NEW.book;
    RETURN NEW;
END $$;
CREATE FUNCTION acts_seal() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF NEW.seq <> (SELECT coalesce(max(seq), 0) + 1 FROM acts)
        OR (NEW.seq > 1 AND NEW.prev <> (SELECT hash FROM acts WHERE seq = NEW.seq - 1)) THEN
        RAISE EXCEPTION 'the act does not follow the last one' USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    IF coalesce((SELECT sum(delta_micro) FROM lines WHERE act = NEW.seq), 1) <> 0 THEN
        RAISE EXCEPTION 'the act does not sum to zero' USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NEW;
END $$;
CREATE FUNCTION journal_stays() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    RAISE EXCEPTION 'the journal is append-only' USING ERRCODE = 'integrity_constraint_violation';
END $$;
CREATE TRIGGER lines_open BEFORE INSERT ON lines FOR EACH ROW EXECUTE FUNCTION lines_open();
CREATE TRIGGER lines_move AFTER INSERT ON lines FOR EACH ROW EXECUTE FUNCTION lines_move();
CREATE TRIGGER acts_seal BEFORE INSERT ON acts FOR EACH ROW EXECUTE FUNCTION acts_seal();
CREATE TRIGGER lines_stay BEFORE UPDATE OR DELETE OR TRUNCATE ON lines EXECUTE FUNCTION journal_stays();
CREATE TRIGGER acts_stay BEFORE UPDATE OR DELETE OR TRUNCATE ON acts EXECUTE FUNCTION journal_stays();
--@ both
