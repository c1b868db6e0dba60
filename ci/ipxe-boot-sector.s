# A boot sector that proves the disk it was loaded from, on the first serial port. Through the BIOS of that disk (int 0x13,
# which iPXE's SAN disk answers) it reads the second sector and prints the text in it, then writes the same to the third.
#
# as --32 -o boot.o ci/ipxe-boot-sector.s && ld -m elf_i386 -Ttext 0x7c00 --oformat binary -o boot.bin boot.o
.code16
.globl _start
_start:
        cli
        xorw %ax, %ax
        movw %ax, %ds
        movw %ax, %es
        movw %ax, %ss
        movw $0x7c00, %sp
        sti
        cld
        movb %dl, drive
        movw $started, %si
        call print
        movw $0x0201, %ax               # read one sector
        movw $0x0002, %cx               # cylinder 0, sector 2
        call disk
        jc failed
        movw $0x7e00, %si
        call print
        movw $0x0301, %ax               # write one sector
        movw $0x0003, %cx               # cylinder 0, sector 3
        call disk
        jc failed
        movw $written, %si
        call print
halt:
        hlt
        jmp halt
failed:
        movw $fault, %si
        call print
        jmp halt
# AX and CX as int 0x13 wants them; memory at 0x7e00. The carry flag says that it failed.
disk:
        movb drive, %dl
        xorb %dh, %dh
        movw $0x7e00, %bx
        int $0x13
        ret
# The text at SI, ended by 0.
print:
        lodsb
        testb %al, %al
        jz 2f
        movb %al, %ah
        movw $0x3fd, %dx
1:      inb %dx, %al
        testb $0x20, %al                # room for another byte
        jz 1b
        movb %ah, %al
        movw $0x3f8, %dx
        outb %al, %dx
        jmp print
2:      ret
drive:  .byte 0
started: .asciz "\r\nBOOT started\r\n"
written: .asciz "BOOT wrote\r\n"
fault:  .asciz "BOOT int 0x13 failed\r\n"
        .org 510
        .word 0xaa55
