package http1

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
)

// ErrMalformed is what Read of a guarded connection returns when the bytes are not acceptable HTTP/1.1.
var ErrMalformed = errors.New("malformed HTTP/1.1 request")

const (
	maxLine    = 64 << 10
	maxHead    = 64 << 10
	maxChunked = 1 << 10 // of a chunk's size line
)

// Guard returns a connection whose Read yields only bytes that the strict framing accepts. HTTP/2 with prior knowledge passes unread.
// After a CONNECT, or a GET that asks for an upgrade other than h2c, everything passes: whoever serves the connection
// must then take it over, or close it after the answer.
func Guard(c net.Conn) net.Conn { return &guarded{Conn: c} }

type guarded struct {
	net.Conn
	framing framing
	err     error
}

func (g *guarded) Read(p []byte) (int, error) {
	if g.err != nil {
		return 0, g.err
	}
	n, err := g.Conn.Read(p)
	if n > 0 && g.framing.state != passing {
		good, bad := g.framing.feed(p[:n])
		if bad != nil {
			g.err = bad
			if good == 0 {
				return 0, bad
			}
			return good, nil // the error follows
		}
	}
	return n, err
}

// CloseWrite implements half-closing for whoever takes the connection over.
func (g *guarded) CloseWrite() error {
	if w, ok := g.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return errors.ErrUnsupported
}

type state int

const (
	requestLine state = iota
	headerLine
	fixedBody
	chunkSize
	chunkData
	chunkEnd // the CRLF after chunk data
	trailerLine
	passing
)

// framing follows the framing of one connection's requests, byte by byte. The zero value is at the beginning of a connection.
type framing struct {
	state    state
	line     []byte
	head     int    // bytes of the current head or trailers
	left     uint64 // of a body or chunk
	requests int

	// of the current head
	method     string
	minor      byte
	length     string // Content-Length
	hasLength  bool
	chunked    bool
	upgrade    bool
	hosts      int
	afterChunk int // bytes of CRLF seen
}

// feed returns how many bytes of p are acceptable, and an error (ErrMalformed) unless all are.
func (f *framing) feed(p []byte) (good int, err error) {
	for i := 0; i < len(p); {
		switch f.state {
		case passing:
			return len(p), nil
		case fixedBody, chunkData:
			n := uint64(len(p) - i)
			if n < f.left {
				f.left -= n
				return len(p), nil
			}
			i += int(f.left)
			f.left = 0
			if f.state == fixedBody {
				f.next()
			} else {
				f.state, f.afterChunk = chunkEnd, 0
			}
			continue
		case chunkEnd:
			if p[i] != "\r\n"[f.afterChunk] {
				return i, f.bad("chunk does not end where its size says")
			}
			i++
			if f.afterChunk++; f.afterChunk == 2 {
				f.state = chunkSize
			}
			continue
		}
		// A line, up to and with its LF.
		end := bytes.IndexByte(p[i:], '\n')
		part := p[i:]
		if end >= 0 {
			part = p[i : i+end+1]
		}
		limit := maxLine
		if f.state == chunkSize {
			limit = maxChunked
		}
		f.head += len(part)
		if len(f.line)+len(part) > limit || f.head > maxHead {
			return i, f.bad("head or line too long")
		}
		f.line = append(f.line, part...)
		if end < 0 {
			return len(p), nil
		}
		line, ok := bytes.CutSuffix(f.line, []byte("\r\n"))
		if !ok || bytes.IndexByte(line, '\r') >= 0 {
			return i, f.bad("a line does not end in CRLF, or has a CR inside")
		}
		f.line = f.line[:0]
		if err := f.take(line); err != nil {
			return i, err
		}
		i += end + 1
	}
	return len(p), nil
}

func (f *framing) bad(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrMalformed, fmt.Sprintf(format, args...))
}

// next prepares for another request on the connection.
func (f *framing) next() {
	*f = framing{line: f.line[:0], requests: f.requests + 1}
}

// take consumes one line without its CRLF.
func (f *framing) take(line []byte) error {
	switch f.state {
	case requestLine:
		return f.takeRequestLine(line)
	case headerLine:
		if len(line) == 0 {
			return f.endOfHead()
		}
		return f.takeField(line)
	case chunkSize:
		f.head = 0
		return f.takeChunkSize(line)
	default: // trailerLine
		if len(line) == 0 {
			f.next()
			return nil
		}
		name, _, err := field(line)
		if err != nil {
			return f.bad("trailer: %v", err)
		}
		switch name { // RFC 9110 §6.5.1
		case "transfer-encoding", "content-length", "host":
			return f.bad("%s as a trailer", name)
		}
		return nil
	}
}

func (f *framing) takeRequestLine(line []byte) error {
	method, rest, ok := strings.Cut(string(line), " ")
	target, version, ok2 := strings.Cut(rest, " ")
	if f.requests == 0 && method == "PRI" && target == "*" && version == "HTTP/2.0" {
		f.state = passing
		return nil
	}
	if !ok || !ok2 || !token(method) || target == "" || (version != "HTTP/1.1" && version != "HTTP/1.0") {
		return f.bad("request line")
	}
	for i := range len(target) {
		if target[i] <= ' ' || target[i] == 0x7f {
			return f.bad("control character in the request target")
		}
	}
	f.method, f.minor, f.state = method, version[7], headerLine
	return nil
}

func (f *framing) takeField(line []byte) error {
	name, value, err := field(line)
	if err != nil {
		return f.bad("%v", err)
	}
	switch name {
	case "host":
		if f.hosts++; f.hosts > 1 {
			return f.bad("two Host fields")
		}
	case "content-length":
		if f.hasLength {
			return f.bad("two Content-Length fields")
		}
		f.hasLength, f.length = true, value
	case "transfer-encoding":
		if f.chunked || !strings.EqualFold(value, "chunked") {
			return f.bad("Transfer-Encoding other than one chunked")
		}
		f.chunked = true
	case "upgrade":
		f.upgrade = f.upgrade || !strings.EqualFold(value, "h2c")
	}
	return nil
}

func (f *framing) endOfHead() error {
	var n uint64
	if f.hasLength {
		var err error
		if n, err = strconv.ParseUint(f.length, 10, 63); err != nil || f.length[0] == '+' {
			return f.bad("Content-Length %q", f.length)
		}
	}
	switch {
	case f.hasLength && f.chunked:
		return f.bad("Content-Length beside Transfer-Encoding")
	case f.chunked && f.minor == '0':
		return f.bad("Transfer-Encoding in HTTP/1.0")
	case f.hosts == 0 && f.minor == '1':
		return f.bad("no Host field")
	case f.method == "CONNECT" && (f.chunked || n > 0):
		return f.bad("CONNECT with a body")
	case f.method == "CONNECT", f.upgrade && f.method == "GET" && !f.chunked && n == 0:
		f.state = passing
	case f.chunked:
		f.state, f.head = chunkSize, 0
	case n > 0:
		f.state, f.left = fixedBody, n
	default:
		f.next()
	}
	return nil
}

func (f *framing) takeChunkSize(line []byte) error {
	size, ext, _ := strings.Cut(string(line), ";")
	size = strings.TrimRight(size, " \t") // BWS before an extension (RFC 9112 §7.1.1)
	if len(size) == 0 || len(size) > 15 {
		return f.bad("chunk size %q", size)
	}
	for i := range len(ext) {
		if ext[i] < ' ' && ext[i] != '\t' || ext[i] == 0x7f {
			return f.bad("control character in a chunk extension")
		}
	}
	for i := range len(size) {
		if c := size[i] | 0x20; !(size[i] >= '0' && size[i] <= '9' || c >= 'a' && c <= 'f') {
			return f.bad("chunk size %q", size)
		}
	}
	n, err := strconv.ParseUint(size, 16, 63)
	if err != nil {
		return f.bad("chunk size %q", size)
	}
	if n == 0 {
		f.state, f.head = trailerLine, 0
		return nil
	}
	f.state, f.left = chunkData, n
	return nil
}

// field splits a field line (RFC 9112 §5): the name in lower case, and the value without surrounding white space.
func field(line []byte) (name, value string, err error) {
	n, v, ok := strings.Cut(string(line), ":")
	if !ok || !token(n) { // also obs-fold, and space before the colon
		return "", "", errors.New("field line without a plain name")
	}
	for i := range len(v) {
		if v[i] < ' ' && v[i] != '\t' || v[i] == 0x7f {
			return "", "", errors.New("control character in a field value")
		}
	}
	return strings.ToLower(n), strings.Trim(v, " \t"), nil
}

// token reports whether s is one (RFC 9110 §5.6.2).
func token(s string) bool {
	for i := range len(s) {
		c := s[i]
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0) {
			return false
		}
	}
	return s != ""
}
