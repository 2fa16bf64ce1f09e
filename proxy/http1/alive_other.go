//go:build !unix

package http1

import "net"

func alive(net.Conn) bool { return true }
