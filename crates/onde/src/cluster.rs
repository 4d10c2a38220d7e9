//! The cluster that a command talks to: its context, broker and job files. Opening it enters a lab's network, so
//! it comes before any socket and any thread.

use anyhow::{Context as _, Result};
use onde_client::broker::Broker;
use onde_client::job::{Job, Jobs};
use onde_lab::Lab;

use crate::config::{Config, Context, jobs_dir};

/// A cluster in use.
#[derive(Debug)]
pub struct Cluster {
    /// Name of the context.
    pub name: String,
    /// Its broker.
    pub broker: Broker,
    /// The user's jobs, of all contexts.
    pub jobs: Jobs,
}

impl Cluster {
    /// Opens the context asked for, or the current one.
    pub fn open(name: Option<&str>) -> Result<Self> {
        let config = Config::load()?;
        let (name, context) = config.choose(name)?;
        enter(context)?;
        Ok(Self {
            name: name.to_owned(),
            broker: Broker::new(&context.broker, &context.key)?,
            jobs: jobs()?,
        })
    }

    /// Opens the context of a job, and finds the job.
    pub fn open_for(job: &str) -> Result<(Self, Job)> {
        let job = jobs()?.find(job)?;
        let cluster = Self::open(Some(&job.context))
            .with_context(|| format!("job {} is of context `{}`", job.short_id(), job.context))?;
        Ok((cluster, job))
    }
}

/// The user's job files.
pub fn jobs() -> Result<Jobs> {
    Ok(Jobs::open(&jobs_dir()?)?)
}

/// Enters the network of a context that is a lab.
pub fn enter(context: &Context) -> Result<()> {
    match &context.lab {
        Some(dir) => Lab::attach(dir)?.enter(),
        None => Ok(()),
    }
}
