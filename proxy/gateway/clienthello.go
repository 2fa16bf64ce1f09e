package gateway

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
)

const (
	maxHello     = 16 << 10 // of the handshake message; real ones are below 3 KiB
	maxRecords   = 16       // that it may be spread over
	recordHeader = 5
)

var (
	errNotTLS = errors.New("not a TLS ClientHello")
	errNoSNI  = errors.New("ClientHello names no server")
)

// ReadHello reads one ClientHello (RFC 8446 §4.1.2), which may be spread over several records, and returns all bytes read and the server
// name in lower case (RFC 6066 §3). It reads nothing beyond the hello's last record.
func ReadHello(r io.Reader) (raw []byte, name string, err error) {
	var msg []byte
	want := 4
	for records := 0; len(msg) < want; records++ {
		if records == maxRecords {
			return raw, "", fmt.Errorf("%w: spread over too many records", errNotTLS)
		}
		var head [recordHeader]byte
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return raw, "", err
		}
		n := int(binary.BigEndian.Uint16(head[3:]))
		if head[0] != 22 || head[1] != 3 || n == 0 || n > 16<<10 {
			return raw, "", errNotTLS
		}
		if len(msg)+n > maxHello {
			return raw, "", fmt.Errorf("%w: longer than %d bytes", errNotTLS, maxHello)
		}
		raw = append(raw, head[:]...)
		at := len(raw)
		raw = append(raw, make([]byte, n)...)
		if got, err := io.ReadFull(r, raw[at:]); err != nil {
			return raw[:at+got], "", err
		}
		msg = append(msg, raw[at:]...)
		if len(msg) >= 4 {
			if msg[0] != 1 {
				return raw, "", errNotTLS
			}
			if want = 4 + int(msg[1])<<16 + int(msg[2])<<8 + int(msg[3]); want > maxHello {
				return raw, "", fmt.Errorf("%w: longer than %d bytes", errNotTLS, maxHello)
			}
		}
	}
	if len(msg) != want {
		return raw, "", errNotTLS // something follows the hello in its record
	}
	name, err = serverName(msg[4:])
	return raw, name, err
}

// cursor consumes a message; after the first shortage it yields nothing.
type cursor struct {
	b   []byte
	bad bool
}

func (c *cursor) take(n int) []byte {
	if c.bad || n > len(c.b) {
		c.bad = true
		return nil
	}
	p := c.b[:n]
	c.b = c.b[n:]
	return p
}

// vector takes a vector with a length of size bytes before it (RFC 8446 §3.4).
func (c *cursor) vector(size int) []byte {
	n := 0
	for _, b := range c.take(size) {
		n = n<<8 | int(b)
	}
	return c.take(n)
}

func serverName(hello []byte) (string, error) {
	c := cursor{b: hello}
	c.take(2 + 32) // legacy_version, random
	c.vector(1)    // legacy_session_id
	c.vector(2)    // cipher_suites
	c.vector(1)    // legacy_compression_methods
	if c.bad {
		return "", errNotTLS
	}
	if len(c.b) == 0 {
		return "", errNoSNI
	}
	ext := cursor{b: c.vector(2)}
	if c.bad || len(c.b) != 0 {
		return "", errNotTLS
	}
	name, found := "", false
	for len(ext.b) > 0 {
		kind, data := ext.take(2), ext.vector(2)
		if ext.bad {
			return "", errNotTLS
		}
		if binary.BigEndian.Uint16(kind) != 0 {
			continue
		}
		if found {
			return "", fmt.Errorf("%w: two server_name extensions", errNotTLS)
		}
		found = true
		sni := cursor{b: data}
		list := cursor{b: sni.vector(2)}
		hostName := list.take(1)
		host := list.vector(2)
		if sni.bad || list.bad || len(sni.b) != 0 || len(list.b) != 0 || hostName[0] != 0 || !validName(host) {
			return "", fmt.Errorf("%w: malformed server_name", errNotTLS)
		}
		name = strings.ToLower(string(host))
	}
	if !found {
		return "", errNoSNI
	}
	return name, nil
}

func validName(b []byte) bool {
	if len(b) == 0 || len(b) > 253 {
		return false
	}
	for _, c := range b {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '.' || c == '_') {
			return false
		}
	}
	return true
}
