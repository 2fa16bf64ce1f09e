package sidecar

import (
	"bytes"
	"net"
	"strings"
	"time"

	"github.com/hanse-mesh/hanse/proxy/gateway"
)

// spoken is what the first bytes of a connection say.
type spoken int

const (
	undecided spoken = iota // so far
	speaksHTTP
	speaksOther
)

const (
	h2Preface   = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	maxSniffed  = 8 << 10 // a request line longer than that is not taken for one
	longestVerb = 20
)

// recognise says whether the first bytes of a connection are HTTP/1's request line or HTTP/2's preface. Nothing short of the whole
// line will do: "GET /x" might be an inline command to a cache.
func recognise(b []byte) spoken {
	if n := min(len(b), len(h2Preface)); string(b[:n]) == h2Preface[:n] {
		if n == len(h2Preface) {
			return speaksHTTP
		}
		return undecided
	}
	for i, c := range b {
		switch {
		case c >= 'A' && c <= 'Z' || c == '-':
			if i == longestVerb {
				return speaksOther
			}
			continue
		case c != ' ' || i == 0:
			return speaksOther
		}
		break
	}
	line, _, whole := bytes.Cut(b, []byte("\n"))
	for _, c := range line {
		if (c < ' ' || c >= 0x7f) && c != '\r' {
			return speaksOther
		}
	}
	if !whole {
		if len(b) >= maxSniffed {
			return speaksOther
		}
		return undecided
	}
	line = bytes.TrimSuffix(line, []byte("\r"))
	if i := bytes.LastIndexByte(line, ' '); i > 0 && strings.HasPrefix(string(line[i:]), " HTTP/1.") && bytes.IndexByte(line, ' ') < i {
		return speaksHTTP
	}
	return speaksOther
}

// sniff reads until it is clear what a caller speaks, for a time: who waits for the server to speak first must not wait long. The
// connection returned has what was read still before it.
func sniff(nc net.Conn, limit time.Duration) (net.Conn, spoken) {
	buf := make([]byte, 0, 512)
	_ = nc.SetReadDeadline(time.Now().Add(limit))
	result := undecided
	for result == undecided {
		if len(buf) == cap(buf) {
			buf = append(buf, 0)[:len(buf)]
		}
		n, err := nc.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		if n > 0 {
			result = recognise(buf)
		}
		if err != nil {
			break // an end or a failure will be met again
		}
	}
	_ = nc.SetReadDeadline(time.Time{})
	if len(buf) == 0 {
		return nc, result
	}
	return &replayedConn{Conn: nc, head: buf}, result
}

// helloTimeout is how long a caller may take to begin with TLS where only TLSRoutes apply.
const helloTimeout = 5 * time.Second

// serverName reads which server a caller names in its ClientHello, for a time; "" where it names none or does not speak TLS. The connection returned has what was
// read still before it.
func serverName(nc net.Conn, limit time.Duration) (net.Conn, string) {
	_ = nc.SetReadDeadline(time.Now().Add(limit))
	raw, name, err := gateway.ReadHello(nc)
	_ = nc.SetReadDeadline(time.Time{})
	if err != nil {
		name = ""
	}
	if len(raw) == 0 {
		return nc, name
	}
	return &replayedConn{Conn: nc, head: raw}, name
}

// replayedConn reads head first.
type replayedConn struct {
	net.Conn
	head []byte
}

func (c *replayedConn) Read(p []byte) (int, error) {
	if len(c.head) > 0 {
		n := copy(p, c.head)
		if c.head = c.head[n:]; len(c.head) == 0 {
			c.head = nil
		}
		return n, nil
	}
	return c.Conn.Read(p)
}

// CloseWrite keeps half-close.
func (c *replayedConn) CloseWrite() error { return connEnd{c.Conn}.CloseWrite() }
