//go:build !linux

package sock

import "net"

// LateBuffer is a buffer that a read takes when it may be filled, and gives back where there was nothing to read yet.
type LateBuffer interface {
	Take() []byte
	Give()
}

// Wrap returns c.
func Wrap(c net.Conn) net.Conn { return c }
