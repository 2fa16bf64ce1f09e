//go:build !linux

package demo

import "syscall"

// attributes make a child the leader of its own group. Other systems have no signal at the parent's death: see Down.
func attributes() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }
