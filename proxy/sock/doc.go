// Package sock makes reads and writes of a connection cheap.
//
// A socket that does not block needs none of what Go does around system calls that may: telling the scheduler, which wakes its monitor
// thread whenever the process was idle, costs a proxy with little to do more than the call. Conn makes the calls directly and waits in Go's own
// poller, so deadlines, closing and half-closing are as ever.
package sock
