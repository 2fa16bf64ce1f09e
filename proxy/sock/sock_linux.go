package sock

import (
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"unsafe"
)

// Wrap returns a Conn for a TCP or Unix connection of package net, and c itself where it is something else.
func Wrap(c net.Conn) net.Conn {
	s, ok := c.(socket)
	if !ok {
		return c
	}
	switch c.(type) {
	case *net.TCPConn, *net.UnixConn:
	default:
		return c
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return c
	}
	w := &Conn{socket: s, raw: raw}
	w.rd.call, w.wr.call = w.tryRead, w.tryWrite
	return w
}

// socket is what TCP and Unix connections have.
type socket interface {
	net.Conn
	syscall.Conn
	CloseWrite() error
}

// Conn is a stream socket.
type Conn struct {
	socket
	raw    syscall.RawConn
	rd, wr operation
}

// operation is the system call of one direction.
type operation struct {
	mu   sync.Mutex // held by its user
	p    []byte
	n    int
	err  error
	late LateBuffer            // of reads; nil: p
	call func(fd uintptr) bool // made once
}

// Read implements net.Conn.
func (c *Conn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	o := &c.rd
	o.mu.Lock()
	o.p, o.n, o.err = p, 0, nil
	err := c.raw.Read(o.call)
	n, own := o.n, o.err
	o.p = nil
	o.mu.Unlock()
	switch {
	case err != nil:
		return 0, renamed("read", err)
	case own == io.EOF:
		return 0, io.EOF
	case own != nil:
		return 0, c.failed("read", own)
	}
	return n, nil
}

// LateBuffer is a buffer that a read takes when it may be filled, and gives back where there was nothing to read yet.
type LateBuffer interface {
	Take() []byte
	Give()
}

// ReadLate reads into b, which it holds only if it returns more than 0.
func (c *Conn) ReadLate(b LateBuffer) (int, error) {
	o := &c.rd
	o.mu.Lock()
	o.late, o.n, o.err = b, 0, nil
	err := c.raw.Read(o.call)
	n, own := o.n, o.err
	o.late, o.p = nil, nil
	o.mu.Unlock()
	switch {
	case err != nil: // without a call: the buffer is given back already
		return 0, renamed("read", err)
	case own != nil:
		b.Give()
		if own == io.EOF {
			return 0, io.EOF
		}
		return 0, c.failed("read", own)
	}
	return n, nil
}

// tryRead is false where there is nothing to read yet.
func (c *Conn) tryRead(fd uintptr) bool {
	o := &c.rd
	if o.late != nil {
		o.p = o.late.Take()
	}
	for {
		n, _, errno := syscall.RawSyscall(syscall.SYS_READ, fd, uintptr(unsafe.Pointer(unsafe.SliceData(o.p))), uintptr(len(o.p)))
		switch {
		case errno == syscall.EINTR:
			continue
		case errno == syscall.EAGAIN:
			if o.late != nil {
				o.p = nil
				o.late.Give()
			}
			return false
		case errno != 0:
			o.err = errno
		case n == 0:
			o.err = io.EOF
		}
		o.n = int(n)
		return true
	}
}

// Write implements net.Conn.
func (c *Conn) Write(p []byte) (int, error) {
	o := &c.wr
	o.mu.Lock()
	o.p, o.n, o.err = p, 0, nil
	err := c.raw.Write(o.call)
	n, own := o.n, o.err
	o.p = nil
	o.mu.Unlock()
	switch {
	case own != nil:
		err = c.failed("write", own)
	case err != nil:
		err = renamed("write", err)
	}
	return n, err
}

// maxWrite keeps one call short: nobody else runs on this thread meanwhile.
const maxWrite = 256 << 10

// tryWrite is false where the socket takes no more yet.
func (c *Conn) tryWrite(fd uintptr) bool {
	o := &c.wr
	for o.n < len(o.p) {
		p := o.p[o.n:]
		n, _, errno := syscall.RawSyscall(syscall.SYS_WRITE, fd, uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(min(len(p), maxWrite)))
		switch errno {
		case 0:
			o.n += int(n)
		case syscall.EINTR:
		case syscall.EAGAIN:
			return false
		default:
			o.err = errno
			return true
		}
	}
	return true
}

func (c *Conn) failed(op string, err error) error {
	return &net.OpError{Op: op, Net: c.LocalAddr().Network(), Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: os.NewSyscallError(op, err)}
}

// renamed has an error of package net say read and write, not raw-read and raw-write.
func renamed(op string, err error) error {
	if e, ok := err.(*net.OpError); ok {
		e.Op = op
	}
	return err
}

// CloseRead ends reading.
func (c *Conn) CloseRead() error {
	if r, ok := c.socket.(interface{ CloseRead() error }); ok {
		return r.CloseRead()
	}
	return nil
}

// SetLinger is as of net.TCPConn.
func (c *Conn) SetLinger(seconds int) error {
	if l, ok := c.socket.(interface{ SetLinger(int) error }); ok {
		return l.SetLinger(seconds)
	}
	return nil
}
