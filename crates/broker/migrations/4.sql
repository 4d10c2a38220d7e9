-- Version 4: a job whose chain is used up gets another, which begins behind this index.
ALTER TABLE jobs ADD COLUMN chain_from INTEGER NOT NULL DEFAULT 0;
UPDATE jobs SET chain_from = first_count;
