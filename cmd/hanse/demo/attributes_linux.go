package demo

import "syscall"

// attributes make a child the leader of its own group, killed by the system when the demo dies.
func attributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
