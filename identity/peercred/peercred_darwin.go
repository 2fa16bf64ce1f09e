package peercred

import "golang.org/x/sys/unix"

// of is LOCAL_PEERCRED and LOCAL_PEERPID, unix(4).
func of(fd int) (Caller, error) {
	c, err := unix.GetsockoptXucred(fd, unix.SOL_LOCAL, unix.LOCAL_PEERCRED)
	if err != nil {
		return Caller{}, err
	}
	pid, err := unix.GetsockoptInt(fd, unix.SOL_LOCAL, unix.LOCAL_PEERPID)
	if err != nil {
		return Caller{}, err
	}
	return Caller{UID: c.Uid, GID: c.Groups[0], Groups: c.Groups[1:min(max(int(c.Ngroups), 1), len(c.Groups))], PID: pid}, nil
}
