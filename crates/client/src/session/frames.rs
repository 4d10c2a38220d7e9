//! Frames of a session over a byte stream: [`onde_wire::session`]'s bytes as reads and writes. Both ends use
//! it, the client's and the agent's. Buffers one frame at a time; never keeps more.

use onde_wire::session::{AgentFrame, ClientFrame, FRAME_MAX, HEAD_SIZE, head};
use std::io::{self, ErrorKind, Read, Write};

/// Reads frames.
pub struct FrameReader<R> {
    stream: R,
    buffer: Box<[u8]>,
}

impl<R: Read> FrameReader<R> {
    /// Reads from `stream`, which stands at the begin of a frame.
    pub fn new(stream: R) -> Self {
        Self { stream, buffer: vec![0; FRAME_MAX].into() }
    }

    /// The stream below, for its timeouts.
    pub fn stream(&self) -> &R {
        &self.stream
    }

    /// The next frame of a client. Errors: `UnexpectedEof` where the stream ended, `InvalidData` for
    /// bytes that are no frame; after any error the stream is of no use.
    pub fn client(&mut self) -> io::Result<ClientFrame<'_>> {
        let (kind, size) = self.fill()?;
        ClientFrame::parse(kind, &self.buffer[HEAD_SIZE..HEAD_SIZE + size]).ok_or_else(no_frame)
    }

    /// The next frame of an agent. Errors: as [`FrameReader::client`].
    pub fn agent(&mut self) -> io::Result<AgentFrame<'_>> {
        let (kind, size) = self.fill()?;
        AgentFrame::parse(kind, &self.buffer[HEAD_SIZE..HEAD_SIZE + size]).ok_or_else(no_frame)
    }

    fn fill(&mut self) -> io::Result<(u8, usize)> {
        let mut start = [0; HEAD_SIZE];
        self.stream.read_exact(&mut start)?;
        let (kind, size) = head(&start).ok_or_else(no_frame)?;
        self.stream.read_exact(&mut self.buffer[HEAD_SIZE..HEAD_SIZE + size])?;
        Ok((kind, size))
    }
}

fn no_frame() -> io::Error {
    io::Error::new(ErrorKind::InvalidData, "the peer sent what is no frame of a session")
}

/// Writes frames.
pub struct FrameWriter<W> {
    stream: W,
    buffer: Box<[u8]>,
}

impl<W: Write> FrameWriter<W> {
    /// Writes to `stream`.
    pub fn new(stream: W) -> Self {
        Self { stream, buffer: vec![0; FRAME_MAX].into() }
    }

    /// The stream below, to end it.
    pub fn stream(&self) -> &W {
        &self.stream
    }

    /// Writes a client's frame, perhaps only to the stream's buffer. Errors: `InvalidInput` where the
    /// frame's fields are larger than a frame.
    pub fn client(&mut self, frame: &ClientFrame<'_>) -> io::Result<()> {
        let size = frame.emit(&mut self.buffer).ok_or(ErrorKind::InvalidInput)?;
        self.stream.write_all(&self.buffer[..size])
    }

    /// Writes an agent's frame, perhaps only to the stream's buffer.
    pub fn agent(&mut self, frame: &AgentFrame<'_>) -> io::Result<()> {
        let size = frame.emit(&mut self.buffer).ok_or(ErrorKind::InvalidInput)?;
        self.stream.write_all(&self.buffer[..size])
    }

    /// Sends what is still in the stream's buffer.
    pub fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}
