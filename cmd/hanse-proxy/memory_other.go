//go:build !linux

package main

import "runtime/debug"

// trim gives free heap back.
func trim() error {
	debug.FreeOSMemory()
	return nil
}
